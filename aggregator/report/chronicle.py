"""A run's history in one pass, as columns of numbers: a few dozen bytes a version, whatever its updates were."""

from __future__ import annotations

import math
from array import array
from collections import Counter, deque
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from aggregator.core.snapshot import VersionRecord
from aggregator.history import read_history, version_line
from aggregator.tally import Tally, count

__all__ = ["MOST_EVENTS", "Chronicle", "Column", "all_lines", "chronicle"]

#: Metrics of evaluations, and of workers' own reports, that are kept: names come from workers.
MOST_METRICS = 24
#: Happenings that are kept, the first half and the newest half of them.
MOST_EVENTS = 400
#: Versions that are kept in full, the newest.
NEWEST = 12
#: Kinds of lines that are happenings, besides versions that were not made of a round.
HAPPENINGS = frozenset({"start", "command", "quarantine", "release"})

Line = Mapping[str, Any]


@dataclass(slots=True)
class Column:
    """Numbers over versions. Both as float64; NaN where a version has none."""

    x: array[float] = field(default_factory=lambda: array("d"))
    y: array[float] = field(default_factory=lambda: array("d"))

    def add(self, x: float, y: object) -> None:
        """One more; NaN if ``y`` is no number."""
        self.x.append(x)
        self.y.append(y if isinstance(y, int | float) and math.isfinite(y) else math.nan)

    @property
    def last(self) -> float | None:
        """The newest that is a number."""
        return next((value for value in reversed(self.y) if not math.isnan(value)), None)


@dataclass(slots=True)
class Chronicle:
    """What the history tells."""

    versions: int = 0
    """Lines of versions."""
    updates: int = 0
    """In all of them, those that were taken back too."""
    first_time: float | None = None
    last_time: float | None = None
    first_digest: str = ""
    """Of the parameters that the first version in it was made from."""
    loss: Column = field(default_factory=Column)
    seconds: Column = field(default_factory=Column)
    stale_median: Column = field(default_factory=Column)
    stale_most: Column = field(default_factory=Column)
    norm: Column = field(default_factory=Column)
    """The median of the updates' norms."""
    staleness: Counter[int] = field(default_factory=Counter)
    metrics: dict[str, Column] = field(default_factory=dict)
    """Of evaluations, by name, over the version that was evaluated."""
    federated: dict[str, dict[str, Column]] = field(default_factory=dict)
    """Of workers on data of their own, by name, then ``min``, ``mean``, ``max``."""
    rejected: dict[str, Column] = field(default_factory=dict)
    """By reason: how many so far, where a line tells of some more."""
    rejected_of: dict[str, Counter[str]] = field(default_factory=dict)
    """By worker, then by reason."""
    workers: dict[str, Tally] = field(default_factory=dict)
    happened: Counter[str] = field(default_factory=Counter)
    """How often, by kind; ``taken back`` and ``spoiled`` are versions that were not made of a round."""
    breaks: int = 0
    """Versions that do not begin where the version before, or the one they were made of, has ended."""
    newest: deque[Line] = field(default_factory=lambda: deque(maxlen=NEWEST))
    software: list[tuple[int, Mapping[str, str]]] = field(default_factory=list)
    """The version at which each other set of releases took over, and their numbers by name."""
    _early: list[Line] = field(default_factory=list)
    _late: deque[Line] = field(default_factory=lambda: deque(maxlen=MOST_EVENTS // 2))
    _digests: dict[int, str] = field(default_factory=dict)

    @property
    def events(self) -> tuple[list[Line], int, list[Line]]:
        """The first happenings, how many are left out, the newest ones."""
        total = sum(self.happened.values())
        return self._early, total - len(self._early) - len(self._late), list(self._late)

    def take(self, line: Line, counting: Mapping[int, Container[str]] | None) -> None:
        """One line of the history. ``counting``: as of :func:`aggregator.tally.tallied`."""
        if isinstance(time := line.get("time"), int | float) and math.isfinite(time):
            self.first_time = time if self.first_time is None else self.first_time
            self.last_time = time
        version, kind = line.get("version"), line.get("kind")
        if not isinstance(version, int):
            return
        match kind:
            case "version":
                self._version(version, line)
                count(self.workers, line, counting)
            case "evaluation":
                self._metrics(version, line.get("metrics"))
            case "federated":
                self._federated(version, line.get("metrics"))
            case "rejected":
                self._rejected(version, line.get("workers"))
            case "start":
                self._start(version, line)
        if kind in HAPPENINGS:
            self._happen(str(kind), line)

    def _version(self, version: int, line: Line) -> None:
        self.versions += 1
        source, before = line.get("source"), str(line.get("before", ""))
        below = version - 1
        if not self._digests:
            self.first_digest = before
        elif below in self._digests and self._digests[below] != before:
            self.breaks += 1
        self._digests[version] = str(line.get("after", ""))
        if len(self._digests) > 2:
            # Only the one before is compared: a version that was taken back begins at the newest as well.
            del self._digests[next(iter(self._digests))]
        self.newest.append(line)
        if source is not None:
            self._happen("spoiled" if line.get("settings") else "taken back", line)
            return
        entries = [entry for entry in line.get("updates") or () if isinstance(entry, Mapping)]
        self.updates += len(entries)
        stale = [s for entry in entries if isinstance(s := entry.get("staleness"), int)]
        norms = [n for entry in entries if isinstance(n := entry.get("norm"), int | float)]
        self.staleness.update(stale)
        self.loss.add(version, line.get("loss"))
        self.seconds.add(version, line.get("seconds"))
        self.stale_median.add(version, median(stale) if stale else None)
        self.stale_most.add(version, max(stale, default=None))
        self.norm.add(version, median(norms) if norms else None)

    def _metrics(self, version: int, metrics: object) -> None:
        for name, value in metrics.items() if isinstance(metrics, Mapping) else ():
            if name in self.metrics or len(self.metrics) < MOST_METRICS:
                self.metrics.setdefault(str(name), Column()).add(version, value)

    def _federated(self, version: int, metrics: object) -> None:
        for name, spread in metrics.items() if isinstance(metrics, Mapping) else ():
            if isinstance(spread, Mapping) and (name in self.federated or len(self.federated) < MOST_METRICS):
                columns = self.federated.setdefault(str(name), {key: Column() for key in ("min", "mean", "max")})
                for key, column in columns.items():
                    column.add(version, spread.get(key))

    def _rejected(self, version: int, workers: object) -> None:
        for worker, reasons in workers.items() if isinstance(workers, Mapping) else ():
            for reason, number in reasons.items() if isinstance(reasons, Mapping) else ():
                if isinstance(number, int):
                    column = self.rejected.setdefault(str(reason), Column())
                    column.add(version, (column.last or 0) + number)
                    self.rejected_of.setdefault(str(worker), Counter())[str(reason)] += number

    def _start(self, version: int, line: Line) -> None:
        software = line.get("software")
        if isinstance(software, Mapping):
            plain = {str(name): str(value) for name, value in software.items()}
            if not self.software or self.software[-1][1] != plain:
                self.software.append((version, plain))

    def _happen(self, kind: str, line: Line) -> None:
        self.happened[kind] += 1
        kept = {key: value for key, value in line.items() if key not in ("updates", "dropped", "folds", "settings")}
        kept["kind"] = kind
        if "dropped" in line:
            kept["dropped"] = len(line["dropped"]) if isinstance(line["dropped"], list) else 0
        if len(self._early) < MOST_EVENTS // 2:
            self._early.append(kept)
        else:
            self._late.append(kept)


def chronicle(
    file: Path, recent: Iterable[VersionRecord] = (), counting: Mapping[int, Container[str]] | None = None
) -> Chronicle:
    """What ``file`` tells, and those in ``recent`` that it lacks.

    Raises :class:`CheckpointError` if the file cannot be read.
    """
    found = Chronicle()
    for line in all_lines(file, recent):
        found.take(line, counting)
    return found


def all_lines(file: Path, recent: Iterable[VersionRecord] = ()) -> Iterator[Line]:
    """The history's lines, and those that only the newest checkpoint has. Raises as :func:`read_history`."""
    told = 0
    for line in read_history(file):
        version = line.get("version")
        if line.get("kind") == "version" and isinstance(version, int):
            told = max(told, version)
        yield line
    for record in recent:
        if record.version > told:
            yield version_line(record)
