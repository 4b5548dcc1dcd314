"""Bucketing: the rule sees the means of random groups of updates.

Karimireddy, He & Jaggi 2022, "Byzantine-Robust Learning on Heterogeneous Datasets via Bucketing", arXiv 2006.09365,
algorithm 1: a random order, cut into groups of ``size``. The means differ less than the updates, and as many groups are
bad as updates at most.

The order is made from the run's seed and the version, so that a replay makes the same groups.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from aggregator.strategies.rows import Rows
from aggregator.strategies.rules.base import Occasion
from aggregator.strategies.rules.geometry import Mixed

__all__ = ["Bucketing", "random_order"]


@dataclass(frozen=True, slots=True)
class Bucketing:
    """Groups of ``size``, the last one of what is left over."""

    size: int = 2

    def left(self, count: int) -> int:
        """One a group."""
        return -(-count // self.size)

    def least(self) -> int:
        """No more than any rule."""
        return 1

    def __call__(self, rows: Rows, occasion: Occasion) -> Rows:
        """See :class:`PreAggregation`."""
        order = random_order(rows.count, occasion.seed, occasion.version)
        matrix = np.zeros((self.left(rows.count), rows.count))
        for row, start in zip(matrix, range(0, rows.count, self.size), strict=True):
            group = order[start : start + self.size]
            row[group] = 1 / len(group)
        return Mixed(rows, matrix)


def random_order(count: int, seed: int, version: int) -> list[int]:
    """Numbers below ``count``, shuffled. By a hash: numpy may change what a seed gives from release to release."""

    def key(index: int) -> bytes:
        return hashlib.blake2b(f"{seed} {version} {index}".encode(), digest_size=16).digest()

    return sorted(range(count), key=key)
