"""One data set cut into the shards of several workers, the same cut on every machine."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import TaskError

__all__ = ["dirichlet", "iid"]

Indices = NDArray[np.int64]


def iid(length: int, count: int, *, seed: int = 0) -> list[Indices]:
    """``count`` random parts of 0 … ``length`` - 1 whose sizes differ by at most one.

    Raises :class:`TaskError` if there are fewer examples than parts.
    """
    _check(length, count, 1)
    order = np.random.default_rng(seed).permutation(length)
    return [np.sort(part) for part in np.array_split(order, count)]


def dirichlet(
    labels: NDArray[Any], count: int, *, alpha: float = 0.3, seed: int = 0, minimum: int = 10
) -> list[Indices]:
    """``count`` parts of unlike mixtures of classes, as data on real sites are.

    For each class the shares of the parts are drawn from a symmetric Dirichlet distribution (Hsu, Qi and
    Brown 2019, "Measuring the effects of non-identical data distribution"): a small ``alpha`` gives most of a
    class to few parts, a large one is close to ``iid``. Parts with fewer than ``minimum`` examples are then
    filled up from the largest ones, where the paper would draw again until all are large enough.

    Args:
        labels: integer classes, of shape (examples,).
        count: number of parts.
        alpha: concentration, more than 0.
        seed: the same seed gives the same parts.
        minimum: smallest number of examples in a part.

    Raises:
        TaskError: there are fewer than ``count * minimum`` examples.
    """
    _check(len(labels), count, minimum)
    random = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in range(count)]
    for label in np.unique(labels):
        members = random.permutation(np.flatnonzero(labels == label))
        shares = random.dirichlet(np.full(count, alpha))
        cuts = np.round(np.cumsum(shares)[:-1] * len(members)).astype(int)
        for part, piece in zip(parts, np.split(members, cuts), strict=True):
            part.extend(piece.tolist())
    for part in parts:
        random.shuffle(part)
    for part in parts:
        while len(part) < minimum:
            part.append(max(parts, key=len).pop())
    return [np.sort(np.array(part, dtype=np.int64)) for part in parts]


def _check(length: int, count: int, minimum: int) -> None:
    if count < 1 or length < count * minimum:
        raise TaskError(f"{length} examples cannot be cut into {count} shards of at least {minimum}: take fewer shards")
