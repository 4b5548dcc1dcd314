"""What a run's folder tells of each worker: its updates in the history, how it stands, what it brought."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregator.core.snapshot import SnapshotHead
from aggregator.core.standing import QuarantinePolicy, Standings
from broker.jsontext import from_json

__all__ = ["CONTRIBUTION_FILE", "Tally", "count", "read_contributions", "rows_of", "tallied"]

#: In the run's folder: what ``fedmq contribution`` found last.
CONTRIBUTION_FILE = "contribution.json"


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


def tallied(
    lines: Iterable[Mapping[str, Any]], counting: Mapping[int, Container[str]] | None = None
) -> dict[str, Tally]:
    """What the versions in ``lines`` of a history were made of, by worker.

    ``counting``: of which versions the updates of whom still count; those of all, if None.
    """
    found: dict[str, Tally] = {}
    for line in lines:
        count(found, line, counting)
    return found


def count(
    found: dict[str, Tally], line: Mapping[str, Any], counting: Mapping[int, Container[str]] | None = None
) -> None:
    """Add one line of a history to ``found``. As :func:`tallied`."""
    entries, version = line.get("updates"), line.get("version")
    if line.get("kind") != "version" or not isinstance(entries, list) or not isinstance(version, int):
        return
    for entry in entries:
        worker = str(entry.get("worker")) if isinstance(entry, Mapping) else None
        if worker is not None and (counting is None or worker in counting.get(version, ())):
            found.setdefault(worker, Tally()).add(entry, version, line.get("time"))


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


def read_contributions(file: Path) -> dict[str, float]:
    """What was found last; nothing if that is not there, or damaged."""
    try:
        rows = from_json(file.read_text())["workers"]
        return {str(row["worker"]): float(row["contribution"]) for row in rows}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _moment(seconds: float) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
