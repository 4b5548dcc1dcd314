"""Rows of a round in memory, made from an array."""

from __future__ import annotations

import numpy as np

from aggregator.strategies.rows import MemoryRows
from broker.messages import Array

__all__ = ["rows_of"]


def rows_of(values: Array, weights: list[float] | None = None) -> MemoryRows:
    """``values`` of shape (K, size), each row of a worker of its own; its dtype is float32 or float64."""
    rows = MemoryRows(values.shape[1], np.dtype(values.dtype))
    for index, row in enumerate(values):
        rows.append([row], 1.0 if weights is None else weights[index], f"w{index}")
    return rows
