"""Geometric median: the point with the smallest sum of distances to all updates.

Pillutla et al. 2022, "Robust Aggregation for Federated Learning" (RFA), arXiv 1912.13445: the smoothed Weiszfeld
iteration, algorithm 2, z <- sum_i b_i x_i / sum_i b_i with b_i = 1 / max(nu, ||z - x_i||).

Where we differ: nu is relative, 1e-6 times the median distance from where it starts, so that gradients of any scale are
treated alike; it starts from the update with the smallest sum of distances and not from the mean, which one attacker
can put anywhere; and since an iteration takes next to nothing (see :mod:`geometry`), it goes on until it stands still.
Updates are weighed by staleness only, not by their number of examples, which an attacker may make up.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.strategies.rows import Rows
from aggregator.strategies.rules.base import Occasion
from aggregator.strategies.rules.geometry import combined, distances_from, squared_distances, tamed
from broker.messages import Array

__all__ = ["GeometricMedian"]

#: nu, relative to the median distance.
SMOOTHING = 1e-6
STILL = 1e-9
MOST_ITERATIONS = 1000


@dataclass(frozen=True, slots=True)
class GeometricMedian:
    """RFA; withstands fewer than half."""

    byzantine: int = 0
    remembers: bool = False

    def least(self) -> int:
        """A majority is good."""
        return 2 * self.byzantine + 1

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        """See :class:`Rule`."""
        del occasion
        squares = squared_distances(rows)
        first = int(np.sqrt(squares).sum(axis=1).argmin())
        rows, squares = tamed(rows, squares, first)
        return combined(rows, _weiszfeld(squares, first))


def _weiszfeld(squares: Array, first: int) -> Array:
    """The weights of the points whose sum is their geometric median, from point number ``first`` on."""
    count = len(squares)
    weights = np.zeros(count)
    weights[first] = 1.0
    smallest = SMOOTHING * float(np.median(np.sqrt(squares[first])))
    if smallest == 0.0:
        return weights  # most are one and the same point, and that is the median
    for _ in range(MOST_ITERATIONS):
        inverse = 1 / np.maximum(smallest, distances_from(weights, squares))
        following = inverse / inverse.sum()
        moved = float(np.abs(following - weights).max())
        weights = following
        if moved < STILL:
            break
    return weights
