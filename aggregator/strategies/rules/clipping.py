"""Clipping before a rule: no update is longer than the median of the round.

Bucketing adds a bad update to a good one before any rule has seen either, so that a very long one spoils its whole
group. Cut to the usual length first, it has no more of the group than a good one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.strategies.rows import Rows
from aggregator.strategies.rules.base import Occasion, OfMajority
from aggregator.strategies.rules.geometry import Mixed, squared_norms

__all__ = ["Clipping"]


@dataclass(frozen=True, slots=True)
class Clipping(OfMajority):
    """See the module."""

    def __call__(self, rows: Rows, occasion: Occasion) -> Rows:
        """See :class:`PreAggregation`."""
        del occasion
        norms = np.sqrt(squared_norms(rows))
        usual = float(np.median(norms))
        return Mixed(rows, np.diag(np.where(norms > usual, usual / np.maximum(norms, usual or 1.0), 1.0)))
