"""Norm clipping: the mean of updates that are no longer than a bound.

Sun et al. 2019, "Can You Really Backdoor Federated Learning?", arXiv 1911.07963: x_i min(1, tau / ||x_i||). Without
``clip_radius`` tau is the median of the round's norms. It stops what is too long and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.strategies.rows import Rows
from aggregator.strategies.rules.base import Occasion
from aggregator.strategies.rules.geometry import combined, squared_norms
from broker.messages import Array

__all__ = ["NormClipping"]


@dataclass(frozen=True, slots=True)
class NormClipping:
    """See the module."""

    byzantine: int = 0
    radius: float | None = None
    """tau; None for the median norm."""
    remembers: bool = False

    def least(self) -> int:
        """A majority is good."""
        return 2 * self.byzantine + 1

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        """See :class:`Rule`."""
        del occasion
        norms = np.sqrt(squared_norms(rows))
        radius = float(np.median(norms)) if self.radius is None else self.radius
        factors = np.where(norms > radius, radius / np.maximum(norms, radius or 1.0), 1.0)
        return combined(rows, factors / rows.count)
