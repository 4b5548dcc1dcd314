"""What workers report of versions on data that they hold out, put together: once a stretch of versions.

Each worker counts once in a stretch, whatever the number of its updates: its newest figures, weighted by the examples
behind them in the mean, and as they are in the spread over workers. A stretch is closed when the next has begun and
everybody who is here has reported on it or on a later one, when it has become old, or when the run ends; what comes
later is dropped.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

__all__ = ["Checks", "Federated", "Spread"]

#: A stretch that began so many stretches, and so many versions, ago is closed.
OLD_STRETCHES, OLD_VERSIONS = 2, 5


@dataclass(frozen=True, slots=True)
class Spread:
    """One metric over workers."""

    mean: float
    """By examples."""
    minimum: float
    median: float
    maximum: float
    std: float
    """Of the population."""


@dataclass(frozen=True, slots=True)
class Federated:
    """Workers' figures of a stretch of versions."""

    version: int
    """The stretch's first."""
    versions: tuple[int, int]
    """The oldest and the newest that they are of."""
    workers: int
    examples: int
    metrics: Mapping[str, Spread]


@dataclass(slots=True)
class _Stretch:
    reports: dict[str, tuple[int, int, Mapping[str, float]]] = field(default_factory=dict)


class Checks:
    """Reports that came in."""

    def __init__(self) -> None:
        self._open: dict[int, _Stretch] = {}
        self._closed = -1
        self._newest: dict[str, int] = {}

    def add(self, worker: str, version: int, examples: int, metrics: Mapping[str, float], every: int) -> None:
        """``worker`` reports on ``version``, of stretches of ``every`` versions."""
        start = version - version % max(1, every)
        self._newest[worker] = max(version, self._newest.get(worker, -1))
        if start > self._closed:
            self._open.setdefault(start, _Stretch()).reports[worker] = version, examples, metrics

    def missing(self, version: int) -> bool:
        """Whether somebody who has ever reported has not done so on ``version``."""
        return any(newest < version for newest in self._newest.values())

    def close(self, newest: int, present: Collection[str], every: int) -> list[Federated]:
        """Stretches that are complete, or old beside version ``newest``, with these workers ``present``."""
        if not self._open:
            return []
        slowest = -1
        # Whoever is done with a stretch has a report in an open one; so much for looking at everybody each time.
        if sum(len(stretch.reports) for stretch in self._open.values()) >= len(present):
            slowest = min((self._newest.get(name, -1) for name in present), default=-1)
        length = max(1, every)
        limit = max(OLD_STRETCHES * length, OLD_VERSIONS)
        # Not before the next has begun: at a start, those who are here may be a few of those who will be.
        through = [start for start in self._open if slowest >= start and newest >= start + length]
        return self._take(through + [start for start in self._open if newest >= start + limit and start not in through])

    def end(self) -> list[Federated]:
        """What is left."""
        return self._take(list(self._open))

    def _take(self, starts: Iterable[int]) -> list[Federated]:
        taken = [_joined(start, self._open.pop(start)) for start in sorted(starts)]
        self._closed = max([self._closed, *(one.version for one in taken)])
        return taken


def _joined(start: int, stretch: _Stretch) -> Federated:
    reports = list(stretch.reports.values())
    names = sorted({name for _, _, metrics in reports for name in metrics})
    return Federated(
        version=start,
        versions=(min(version for version, _, _ in reports), max(version for version, _, _ in reports)),
        workers=len(reports),
        examples=sum(examples for _, examples, _ in reports),
        metrics={name: spread for name in names if (spread := _spread(name, reports)) is not None},
    )


def _spread(name: str, reports: list[tuple[int, int, Mapping[str, float]]]) -> Spread | None:
    """Of those whose figure is finite; None if there are none."""
    known = [
        (metrics[name], examples) for _, examples, metrics in reports if math.isfinite(metrics.get(name, math.nan))
    ]
    if not known:
        return None
    values = [value for value, _ in known]
    total = sum(examples for _, examples in known)
    return Spread(
        mean=math.fsum(value * (examples / total) for value, examples in known),
        minimum=min(values),
        median=statistics.median(values),
        maximum=max(values),
        std=statistics.pstdev(values),
    )
