"""Chance, by purpose: one seed gives a stream of random numbers for each, and none depends on another.

A scenario that draws one number more for its network has the same workers as before. Nothing draws from numpy's or
Python's global state.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["drawn", "stream"]

Array = NDArray[Any]

_BLOCK = 4096


def stream(seed: int, purpose: str) -> np.random.Generator:
    """The generator of ``purpose`` under ``seed``; the same on every machine."""
    words = np.frombuffer(hashlib.sha256(purpose.encode()).digest()[:16], "<u4")
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, *map(int, words)])))


def drawn(draw: Callable[[int], Array]) -> Iterator[float]:
    """Numbers one by one from a generator's method that gives many at once, which takes far less time.

    Args:
        draw: from a count to as many numbers, as an array of shape (count,).
    """
    while True:
        yield from draw(_BLOCK).tolist()
