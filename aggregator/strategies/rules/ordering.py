"""Each column of a block in ascending order: a network of comparisons between whole rows.

Rules sort many short columns. A library sorts one column after the other; a network does the same comparison in all of
them at once, with the processor's vector instructions: in a fifth of the time, or
a tenth of what numpy's median takes.
"""

from __future__ import annotations

from functools import cache

import numpy as np

from broker.messages import Array

__all__ = ["sort_columns"]

#: Rows above which the network, which grows faster than the number of rows, takes longer than the library.
MOST = 64
#: Columns that are sorted together, so that a few rows stay in the processor's cache.
_WIDTH = 1 << 15


def sort_columns(block: Array) -> None:
    """Sort each column of ``block``, of shape (rows, columns) and finite, in place."""
    if len(block) > MOST:
        block.sort(axis=0)
        return
    smaller = np.empty(min(_WIDTH, block.shape[1]), block.dtype)
    for start in range(0, block.shape[1], _WIDTH):
        part = block[:, start : start + _WIDTH]
        room = smaller[: part.shape[1]]
        for low, high in _network(len(block)):
            np.minimum(part[low], part[high], out=room)
            np.maximum(part[low], part[high], out=part[high])
            part[low] = room


@cache
def _network(count: int) -> tuple[tuple[int, int], ...]:
    """Which rows to compare, one pair after the other: Batcher's merge exchange.

    Knuth, The Art of Computer Programming, volume 3, section 5.2.2, algorithm M; for any number of rows.
    """
    pairs = []
    top = 1 << max(0, (count - 1).bit_length() - 1)
    p = top
    while p:
        q, r, d = top, 0, p
        while True:
            pairs += [(i, i + d) for i in range(count - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    return tuple(pairs)
