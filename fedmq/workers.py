"""``fedmq workers``: how the workers of a run stand, from its folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from rich.markup import escape
from rich.table import Table as Grid

from aggregator.ancestry import Ancestry
from aggregator.checkpoint import CheckpointStore
from aggregator.checkpoints import require_some
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.history import read_history, version_line
from aggregator.tally import CONTRIBUTION_FILE, read_contributions, rows_of, tallied
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

__all__ = ["workers"]

#: ``version`` and ``time`` are those of the newest version with an update of the worker.
COLUMNS = (
    *("worker", "updates", "share", "version", "time (UTC)", "steps", "s/step", "staleness", "cosine", "norm"),
    *("rejected", "score", "contribution", ""),
)


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
    return rows_of(tallied(lines, counting), head, half_life, read_contributions(place / CONTRIBUTION_FILE))


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
