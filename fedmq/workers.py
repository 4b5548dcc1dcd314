"""``fedmq workers``: how the workers of a run stand, from its folder."""

from __future__ import annotations

import json
import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table as Grid

from aggregator.ancestry import Ancestry
from aggregator.checkpoint import CheckpointStore
from aggregator.checkpoints import require_some
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.core.snapshot import SnapshotHead
from aggregator.core.standing import QuarantinePolicy, Standings
from aggregator.history import read_history, version_line
from broker.console import (
    ConfigOption,
    JsonOption,
    RunOption,
    SetOption,
    VerboseOption,
    guard,
    parse_flags,
    say,
    say_table,
    set_up_logging,
)
from broker.settings import Settings, load
from fedmq.contribution import CONTRIBUTION_FILE

__all__ = ["Tally", "rows_of", "tallied", "workers"]

#: ``version`` and ``time`` are those of the newest version with an update of the worker.
COLUMNS = (
    *("worker", "updates", "share", "version", "time (UTC)", "steps", "s/step", "staleness", "cosine", "norm"),
    *("rejected", "score", "contribution", ""),
)


@dataclass(slots=True)
class Tally:
    """What the history tells of one worker."""

    updates: int = 0
    examples: int = 0
    newest: int = 0
    """The version that its last update is in."""
    time: float | None = None
    """When that was made, seconds since 1970."""
    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, entry: Mapping[str, Any], version: int, time: object) -> None:
        """One update more, in a version that was made at ``time``."""
        self.updates += 1
        if version >= self.newest:
            self.newest, self.time = version, time if isinstance(time, int | float) else None
        examples = entry.get("examples")
        self.examples += examples if isinstance(examples, int) else 0
        for name, value in (
            *((n, entry.get(n)) for n in ("staleness", "cosine", "norm", "steps")),
            ("pace", _pace(entry)),
        ):
            if isinstance(value, int | float) and math.isfinite(value):
                self.sums[name] = self.sums.get(name, 0.0) + value
                self.counts[name] = self.counts.get(name, 0) + 1

    def mean(self, name: str) -> float | None:
        """The mean over the updates that have it of ``staleness``, ``cosine``, ``norm``, ``steps``, or ``pace``.

        The pace is seconds for one local step.
        """
        return self.sums[name] / self.counts[name] if self.counts.get(name) else None


def workers(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Show the workers of a run: updates, pace, staleness, agreement, rejections, score, quarantine, contribution.

    As the run's folder has it, up to its newest checkpoint, without what was taken back. The share is of all updates,
    the contribution what 'fedmq contribution' found last.

    Example: fedmq workers --run digits
    """
    with guard():
        set_up_logging(verbose, quiet=not verbose)
        flags = parse_flags(settings or [], run=run, aggregator__folder=folder)
        read = load({"aggregator": AggregatorConfig}, file=config, flags=flags)
        rows = _rows(read)
        if as_json:
            say(json.dumps(rows, indent=2))
            return
        if not rows:
            say("no worker has sent anything yet")
            return
        table = Grid(box=None, pad_edge=False, header_style="bold")
        for name in COLUMNS:
            table.add_column(name, justify="left" if name in ("worker", "") else "right", no_wrap=name == "worker")
        for row in rows:
            table.add_row(*map(escape, _shown(row)))
        say_table(table)


def tallied(
    lines: Iterable[Mapping[str, Any]], counting: Mapping[int, Container[str]] | None = None
) -> dict[str, Tally]:
    """What the versions in ``lines`` of a history were made of, by worker.

    ``counting``: of which versions the updates of whom still count; those of all, if None.
    """
    found: dict[str, Tally] = {}
    for line in lines:
        entries, version = line.get("updates"), line.get("version")
        if line.get("kind") != "version" or not isinstance(entries, list) or not isinstance(version, int):
            continue
        for entry in entries:
            worker = str(entry.get("worker")) if isinstance(entry, Mapping) else None
            if worker is not None and (counting is None or worker in counting.get(version, ())):
                found.setdefault(worker, Tally()).add(entry, version, line.get("time"))
    return found


def rows_of(
    tallies: Mapping[str, Tally], head: SnapshotHead, half_life: int, contributions: Mapping[str, float]
) -> list[dict[str, Any]]:
    """A row a worker, by name: of the history, of the newest checkpoint, and of what was found of contributions."""
    standings = Standings(QuarantinePolicy(half_life=half_life), head.standings)
    names = {*tallies, *head.standings, *head.trainers, *head.confirmed}
    total = sum(tally.updates for tally in tallies.values())
    rows = []
    for name in sorted(names):
        tally = tallies.get(name, Tally())
        known = head.standings.get(name)
        rows.append(
            {
                "worker": name,
                "updates": tally.updates,
                "examples": tally.examples,
                "share": tally.updates / total if total else None,
                "newest": tally.newest if tally.updates else None,
                "time": None if tally.time is None else _moment(tally.time).isoformat(timespec="milliseconds"),
                "steps": tally.mean("steps"),
                "pace": tally.mean("pace"),
                "staleness": tally.mean("staleness"),
                "cosine": tally.mean("cosine"),
                "norm": tally.mean("norm"),
                "rejected": dict(known.rejected) if known else {},
                "score": standings.score(name, head.version),
                "quarantined_until": known.until if known else None,
                "present": name in head.trainers,
                "contribution": contributions.get(name),
            }
        )
    return rows


def _pace(entry: Mapping[str, Any]) -> float | None:
    steps, seconds = entry.get("steps"), entry.get("seconds")
    known = isinstance(steps, int) and isinstance(seconds, int | float) and steps > 0 and seconds > 0
    return seconds / steps if known else None  # type: ignore[operator]


def _rows(read: Settings) -> list[dict[str, Any]]:
    store = CheckpointStore(checkpoint_folder(read), read.run)
    require_some(read, store)
    head = store.head()
    place = run_folder(read)
    lines = [line for line in read_history(place / "history.jsonl") if line.get("kind") == "version"]
    told = {line.get("version") for line in lines}
    lines += [version_line(record) for record in head.records if record.version not in told]
    half_life = read.table("aggregator", AggregatorConfig).changed(head.changes).score_half_life
    counting = Ancestry(place / "history.jsonl", head.records).by_worker(head.version)
    return rows_of(tallied(lines, counting), head, half_life, _contributions(place / CONTRIBUTION_FILE))


def _contributions(file: Path) -> dict[str, float]:
    """What was found last; nothing if that is not there, or damaged."""
    try:
        rows = json.loads(file.read_text())["workers"]
        return {str(row["worker"]): float(row["contribution"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _shown(row: Mapping[str, Any]) -> list[str]:
    rejected = sum(row["rejected"].values())
    figures = [_number(row[name]) for name in ("steps", "pace", "staleness", "cosine", "norm")]
    score = _number(row["score"]) if row["score"] else ""
    worth = "" if row["contribution"] is None else f"{row['contribution']:+.3g}"
    where = "" if row["present"] else "away"
    if row["quarantined_until"] is not None:
        where = f"in quarantine until {_moment(row['quarantined_until']):%Y-%m-%d %H:%M:%S} UTC"
    share = "" if row["share"] is None else f"{row['share']:.1%}"
    newest = "" if row["newest"] is None else str(row["newest"])
    time = "" if row["time"] is None else f"{datetime.fromisoformat(row['time']):%Y-%m-%d %H:%M:%S}"
    counted = [row["worker"], str(row["updates"]), share, newest, time]
    return [*counted, *figures, str(rejected or ""), score, worth, where]


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"
