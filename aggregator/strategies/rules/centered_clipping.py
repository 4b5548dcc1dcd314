"""Centered clipping: each update counts as far as it is within a radius of what is expected.

Karimireddy, He & Jaggi 2021, "Learning from History for Byzantine Robust Optimization", arXiv 2012.10333, algorithm 2:

    v <- v + 1/K sum_i (x_i - v) min(1, tau / ||x_i - v||)

beginning with the last round's aggregate, some times over. The centre, the paper's "history", is part of the run's
state and comes back with it after a restart and in a replay; the first round begins with zeros.

Where we differ: without ``clip_radius``, tau is the median of the distances from v, found anew in each iteration. It
follows the updates' scale by itself, and a minority cannot move it beyond what the others have.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.strategies.rows import Rows
from aggregator.strategies.rules.base import Occasion
from aggregator.strategies.rules.geometry import combined, distances_from, squared_distances, tamed
from broker.messages import Array

__all__ = ["CenteredClipping"]


@dataclass(frozen=True, slots=True)
class CenteredClipping:
    """See the module."""

    byzantine: int = 0
    radius: float | None = None
    """tau; None for the median distance."""
    iterations: int = 3
    remembers: bool = True

    def least(self) -> int:
        """A majority is good."""
        return 2 * self.byzantine + 1

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        """See :class:`Rule`."""
        centre, count = occasion.previous, rows.count
        squares = squared_distances(rows, point=centre, has_point=True)
        rows, squares = tamed(rows, squares, count, point=centre, has_point=True)
        weights = np.zeros(count + 1)
        weights[count] = 1.0
        for _ in range(self.iterations):
            away = distances_from(weights, squares)[:count]
            radius = float(np.median(away)) if self.radius is None else self.radius
            # Who is nearer than the radius counts whole; this also avoids a division by a distance of zero.
            shares = np.where(away > radius, radius / np.maximum(away, radius or 1.0), 1.0) / count
            weights *= 1 - shares.sum()
            weights[:count] += shares
        return combined(rows, weights, point=centre)
