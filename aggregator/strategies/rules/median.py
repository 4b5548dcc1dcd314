"""The coordinate-wise median (Yin et al. 2018, "Byzantine-Robust Distributed Learning", arXiv 1803.01498, option I).

Fewer than half of the workers may send what they like, and each number still comes from between those of the others.
For an even number of updates it is the mean of the two in the middle, as numpy has it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.strategies.rows import Rows, columns
from aggregator.strategies.rules.base import Occasion
from aggregator.strategies.rules.ordering import sort_columns
from broker.messages import Array

__all__ = ["Median"]


@dataclass(frozen=True, slots=True)
class Median:
    """The median of each coordinate."""

    byzantine: int = 1
    remembers: bool = False

    def least(self) -> int:
        """A majority is good; the median of two is their mean."""
        return max(3, 2 * self.byzantine + 1)

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        """See :class:`Rule`."""
        del occasion
        result, middle = np.empty(rows.size, rows.dtype), rows.count // 2
        for start, stop in columns(rows):
            block = rows.block(start, stop)
            sort_columns(block)
            if rows.count % 2:
                result[start:stop] = block[middle]
            else:
                np.add(block[middle - 1], block[middle], out=result[start:stop])
                result[start:stop] /= 2
        return result
