"""Workers as arrays: how fast each is, and when it is there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedmq.simulation.clock import ticks, ticks_of
from fedmq.simulation.randomness import drawn, stream
from fedmq.simulation.scenario import PopulationTable

__all__ = ["Availability", "Speeds", "names_of"]

Array = NDArray[Any]


def names_of(count: int) -> list[str]:
    """The workers' names, by their numbers."""
    return [f"w{number}" for number in range(count)]


class Speeds:
    """How long trainings take, in microseconds."""

    def __init__(self, table: PopulationTable, seed: int) -> None:
        generator = stream(seed, "speed")
        self._draw = _draw_of(table, generator)
        self._own: Array | None = None if table.redraw else ticks_of(self._draw(table.workers))
        self._anew = drawn(lambda count: ticks_of(self._draw(count)))
        self._jitter: Iterator[float] | None = None
        if table.jitter:
            jitter = stream(seed, "jitter")
            self._jitter = drawn(lambda count: np.exp(jitter.normal(0.0, table.jitter, count)))
        self._shortest = int(self._own.min()) if self._own is not None else ticks(_least(table))

    @property
    def shortest(self) -> int:
        """No training is shorter, jitter apart."""
        return self._shortest

    def next(self, worker: int) -> int:
        """Of the next training of ``worker``."""
        base = int(next(self._anew)) if self._own is None else int(self._own[worker])
        return base if self._jitter is None else max(1, round(base * next(self._jitter)))


def _draw_of(table: PopulationTable, generator: np.random.Generator) -> Callable[[int], Array]:
    """From a count to as many durations in seconds."""

    def draw(count: int) -> Array:
        match table.speed:
            case "constant":
                seconds = np.full(count, table.seconds)
            case "lognormal":
                seconds = table.seconds * np.exp(generator.normal(0.0, table.spread, count))
            case "halfnormal":
                seconds = table.seconds * (np.abs(generator.normal(0.0, 1.0, count)) + 0.01)
            case "zipf":
                seconds = table.seconds * generator.zipf(table.exponent, count).astype(np.float64)
        shortened: Array = np.minimum(seconds, table.longest)
        return shortened

    return draw


def _least(table: PopulationTable) -> float:
    return {"constant": table.seconds, "zipf": table.seconds, "halfnormal": 0.01 * table.seconds}.get(table.speed, 0.0)


class Availability:
    """When workers come and go."""

    def __init__(self, table: PopulationTable, seed: int) -> None:
        self._table = table
        generator = stream(seed, "availability")
        self._exponential = drawn(lambda count: generator.exponential(1.0, count))
        share = table.on_share
        if table.availability == "on-off":
            share = table.on_seconds / (table.on_seconds + table.off_seconds)
        # Where in its day each worker is when the scenario begins; of on-off, only whether it is there.
        self._phases = generator.random(table.workers)
        self._share = share

    @property
    def changes(self) -> bool:
        """Whether anybody ever comes or goes."""
        return self._table.availability != "always"

    def is_on_at_start(self, worker: int) -> bool:
        """Whether ``worker`` is there when the scenario begins."""
        return not self.changes or bool(self._phases[worker] < self._share)

    def first_change(self, worker: int) -> int:
        """When ``worker`` comes or goes for the first time."""
        if self._table.availability == "on-off":
            return self.next_change(0, is_on=self.is_on_at_start(worker))
        phase = float(self._phases[worker])
        until = self._share - phase if phase < self._share else 1.0 - phase
        return max(1, ticks(until * self._table.day_seconds))

    def next_change(self, now: int, *, is_on: bool) -> int:
        """When a worker that has just come (``is_on``) or gone does the other."""
        table = self._table
        if table.availability == "on-off":
            mean = table.on_seconds if is_on else table.off_seconds
            return now + max(1, ticks(mean * next(self._exponential)))
        return now + max(1, ticks((self._share if is_on else 1.0 - self._share) * table.day_seconds))
