"""Krum and Multi-Krum: the updates that have the nearest neighbours.

Blanchard et al. 2017, "Machine Learning with Adversaries", arXiv 1703.02757: the score of an update is the sum of its
squared distances to the K - f - 2 updates nearest to it. Krum takes the one with the smallest score, Multi-Krum the
mean of the m = K - f with the smallest. (The paper leaves m open; K - f are as many as are good.)

Krum alone throws away what the other workers have learned, and is turned round by attacks that lie close together
(see docs/algorithms.md): it is here for comparison.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.strategies.rows import Rows
from aggregator.strategies.rules.base import Occasion
from aggregator.strategies.rules.geometry import combined, squared_distances
from broker.messages import Array

__all__ = ["Krum", "MultiKrum", "krum_scores"]


def krum_scores(squares: Array, byzantine: int) -> Array:
    """The scores of K updates with squared distances ``squares``, of shape (K, K); at least one neighbour counts."""
    count = len(squares)
    neighbours = max(1, count - byzantine - 2)
    others = np.sort(squares + np.diag(np.full(count, np.inf)), axis=1)[:, : min(neighbours, count - 1)]
    scores: Array = others.sum(axis=1)
    return scores


@dataclass(frozen=True, slots=True)
class MultiKrum:
    """The mean of the K - ``byzantine`` updates with the smallest scores."""

    byzantine: int
    remembers: bool = False

    def least(self) -> int:
        """2 f + 2 < K (the paper's proposition 1)."""
        return 2 * self.byzantine + 3

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        """See :class:`Rule`."""
        del occasion
        bad = _assumed(self.byzantine, rows.count)
        return _best(rows, bad, self._chosen(rows.count - bad))

    def _chosen(self, good: int) -> int:
        return good


@dataclass(frozen=True, slots=True)
class Krum(MultiKrum):
    """The update with the smallest score, the first of equals."""

    def _chosen(self, good: int) -> int:
        del good
        return 1


def _assumed(byzantine: int, count: int) -> int:
    return max(0, min(byzantine, (count - 3) // 2))


def _best(rows: Rows, byzantine: int, chosen: int) -> Array:
    """The mean of the ``chosen`` rows with the smallest scores."""
    scores = krum_scores(squared_distances(rows), byzantine)
    weights = np.zeros(rows.count)
    weights[np.argsort(scores, kind="stable")[:chosen]] = 1 / chosen
    return combined(rows, weights)
