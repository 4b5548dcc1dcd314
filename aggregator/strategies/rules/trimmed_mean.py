"""Trimmed mean: in each coordinate, without the largest and the smallest.

Yin et al. 2018, "Byzantine-Robust Distributed Learning", arXiv 1803.01498, definition 2, with beta K = ``byzantine``.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.strategies.rows import Rows, columns
from aggregator.strategies.rules.base import Occasion
from aggregator.strategies.rules.ordering import sort_columns
from broker.messages import Array

__all__ = ["TrimmedMean"]


@dataclass(frozen=True, slots=True)
class TrimmedMean:
    """Drops the ``byzantine`` largest and smallest of each coordinate and takes the mean of the others."""

    byzantine: int
    remembers: bool = False

    def least(self) -> int:
        """One is left in the middle."""
        return 2 * self.byzantine + 1

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        """See :class:`Rule`."""
        del occasion
        cut = min(self.byzantine, (rows.count - 1) // 2)
        result = np.empty(rows.size, rows.dtype)
        for start, stop in columns(rows):
            block = rows.block(start, stop)
            sort_columns(block)
            middle = block[cut : rows.count - cut]
            # From the first row on, one after the other: as exact as the mean of so few needs to be in doubles.
            result[start:stop] = middle.sum(axis=0, dtype=np.float64) / len(middle)
        return result
