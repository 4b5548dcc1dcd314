"""Nearest-neighbour mixing (NNM): each update is replaced by the mean of the K - f updates nearest to it.

Allouah et al. 2023, "Fixing by Mixing", arXiv 2302.01772, algorithm 2; an update is its own nearest neighbour. It makes
up for data that differ between workers, where a rule alone would take the ones that differ most for bad ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.strategies.rows import Rows
from aggregator.strategies.rules.base import Occasion, OfMajority
from aggregator.strategies.rules.geometry import Mixed, squared_distances

__all__ = ["NearestNeighbours"]


@dataclass(frozen=True, slots=True)
class NearestNeighbours(OfMajority):
    """See the module."""

    def __call__(self, rows: Rows, occasion: Occasion) -> Rows:
        """See :class:`PreAggregation`."""
        del occasion
        squares = squared_distances(rows)
        np.fill_diagonal(squares, -1.0)  # first of all itself, also where others are the same
        kept = rows.count - min(self.byzantine, (rows.count - 1) // 2)
        matrix = np.zeros((rows.count, rows.count))
        for row, nearest in zip(matrix, np.argsort(squares, axis=1, kind="stable"), strict=True):
            row[nearest[:kept]] = 1 / kept
        return Mixed(rows, matrix)
