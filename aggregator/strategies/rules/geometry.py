"""Distances between rows, and sums of rows: what most robust rules are made of.

Krum, the geometric median, centered clipping and nearest neighbours ask only how far rows are from each other, and
give a weighted sum of rows. So a rule reads all rows twice, once for the distances and once for the sum, however many
iterations it makes in between on a small matrix: with points x_i and weights w of sum 1,

    ||sum_j w_j x_j - x_i||^2  =  (D w)_i - w' D w / 2,        D_ij = ||x_i - x_j||^2
"""

from __future__ import annotations

import numpy as np

from aggregator.strategies.rows import Rows, columns
from broker.messages import Array

__all__ = ["Mixed", "combined", "distances_from", "squared_distances", "squared_norms", "tamed"]

#: Of the doubles that are worked on together; small, so that they stay in the processor's cache.
CACHED_BYTES = 1 << 20

#: Rows so many times further from a centre than half of the others are brought to that distance: the direction is
#: kept, and the squares of what is left can be told from rounding errors.
FAR = 1e6


class Mixed:
    """Rows that are weighted sums of other rows and of one more point: nothing is calculated before it is read."""

    def __init__(self, rows: Rows, matrix: Array, point: Array | None = None) -> None:
        """See the class.

        Args:
            rows: what to add up.
            matrix: of shape (new rows, ``rows.count``), or with one column more for ``point``.
            point: of shape (``rows.size``,); None for the origin.
        """
        self._rows, self._matrix, self._point = rows, matrix, point
        self.count = len(matrix)
        self.size = rows.size
        self.dtype = rows.dtype
        self.weights = tuple(1.0 for _ in matrix)
        self.workers = tuple(
            "+".join(sorted({rows.workers[j] for j in np.flatnonzero(row[: rows.count])})) for row in matrix
        )

    def block(self, start: int, stop: int) -> Array:
        """See :class:`Rows`."""
        return self._of(self._matrix, start, stop)

    def row(self, index: int) -> Array:
        """See :class:`Rows`."""
        row = np.empty(self.size, self.dtype)
        for start, stop in columns(self._rows):
            row[start:stop] = self._of(self._matrix[index : index + 1], start, stop)[0]
        return row

    def _of(self, matrix: Array, start: int, stop: int) -> Array:
        block = self._rows.block(start, stop).astype(np.float64, copy=False)
        result = np.empty((len(matrix), block.shape[1]), self.dtype)
        for index, weights in enumerate(matrix):
            total = np.zeros(block.shape[1])
            for j in np.flatnonzero(weights[: len(block)]):
                total += weights[j] * block[j]
            if self._point is not None and len(weights) > len(block):
                total += weights[-1] * self._point[start:stop].astype(np.float64)
            result[index] = total
        return result


def squared_distances(rows: Rows, *, point: Array | None = None, has_point: bool = False) -> Array:
    """D, with D_ij = ||x_i - x_j||^2 in float64; shape (K, K), or (K + 1, K + 1) with one more point as the last.

    Args:
        rows: K of them.
        point: of shape (``rows.size``,); None for the origin.
        has_point: whether there is one.
    """
    count = rows.count + has_point
    squares = np.zeros((count, count))
    for start, stop in columns(rows):
        block = rows.block(start, stop)
        width = max(1, CACHED_BYTES // (8 * count))
        for begin in range(0, stop - start, width):
            part = block[:, begin : begin + width].astype(np.float64)
            if has_point:
                own = slice(start + begin, start + begin + part.shape[1])
                last = np.zeros(part.shape[1]) if point is None else point[own]
                part = np.vstack([part, last])
            for i in range(count - 1):
                apart = part[i + 1 :] - part[i]
                np.multiply(apart, apart, out=apart)
                squares[i, i + 1 :] += apart.sum(axis=1)
    return squares + squares.T


def squared_norms(rows: Rows) -> Array:
    """``||x_i||^2`` in float64; shape (K,)."""
    squares = np.zeros(rows.count)
    for start, stop in columns(rows):
        block = rows.block(start, stop)
        width = max(1, CACHED_BYTES // (8 * rows.count))
        for begin in range(0, stop - start, width):
            part = block[:, begin : begin + width].astype(np.float64)
            squares += np.multiply(part, part, out=part).sum(axis=1)
    return squares


def combined(rows: Rows, weights: Array, *, point: Array | None = None) -> Array:
    """``sum_i weights_i x_i``, of shape (size,) in the rows' dtype.

    Args:
        rows: K of them.
        weights: of shape (K,), or (K + 1,) with that of ``point`` as the last.
        point: of shape (``rows.size``,); None for the origin.
    """
    return Mixed(rows, weights[np.newaxis], point).row(0)


def distances_from(weights: Array, squares: Array) -> Array:
    """How far each point is from ``sum_j weights_j x_j``: shape (K,), for weights of sum 1 and D."""
    towards = _times(squares, weights)
    return np.sqrt(np.maximum(towards - float((towards * weights).sum()) / 2, 0.0))


def tamed(
    rows: Rows, squares: Array, centre: int, *, point: Array | None = None, has_point: bool = False
) -> tuple[Rows, Array]:
    """``rows`` and their D with those that are very far from point ``centre`` brought nearer.

    The influence of a far point on a geometric median or on clipping is that of its direction. At a distance of 1e6
    times the others' that is left to one part in a million; what a distance of 1e12 times does to D is not.

    Args:
        rows: K of them.
        squares: D, of K or K + 1 points.
        centre: the index of a point that can be relied on.
        point: as in :func:`squared_distances`.
        has_point: likewise.
    """
    away = np.sqrt(squares[centre])
    others = np.sort(np.delete(away, centre))
    limit = FAR * float(others[(len(others) - 1) // 2]) if len(others) else 0.0
    if limit == 0.0 or not (away > limit).any():
        return rows, squares
    kept = np.minimum(1.0, limit / np.maximum(away[: rows.count], limit))
    matrix = np.diag(kept) if not has_point else np.hstack([np.diag(kept), np.zeros((rows.count, 1))])
    matrix[:, centre] += 1 - kept
    nearer = Mixed(rows, matrix, point)
    return nearer, squared_distances(nearer, point=point, has_point=has_point)


def _times(matrix: Array, vector: Array) -> Array:
    """The product, by numpy's own sums."""
    product: Array = (matrix * vector).sum(axis=1)
    return product
