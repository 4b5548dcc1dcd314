"""A random rotation: signs from a counter, and the Walsh-Hadamard transform in a fixed order."""

from __future__ import annotations

import numpy as np

from broker.messages import Array

__all__ = ["flip_signs", "transform"]

# Steele, Lea & Flood 2014 (SplitMix64): the increment and the two multipliers.
GOLDEN = 0x9E3779B97F4A7C15
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)


def flip_signs(values: Array, seed: int, start: int) -> None:
    """Flip, in place, the sign of each of ``values`` (float32) whose bit in the stream of ``seed`` is 1.

    The bit of position p is bit p % 64 of SplitMix64 of (mixed seed, p // 64): a counter, not a generator's state, so
    that each block can be had by itself, and defined here, not by a version of numpy. ``start``, the position of the
    first value, is a multiple of 64.
    """
    words = np.arange(start // 64, -(-(start + values.size) // 64), dtype=np.uint64)
    hashed = _mixed((words + np.uint64(1)) * np.uint64(GOLDEN) + _mixed(np.array([seed], np.uint64)))
    bits = np.unpackbits(hashed.astype("<u8", copy=False).view(np.uint8), count=values.size, bitorder="little")
    signs = bits.astype(np.uint32)
    signs <<= np.uint32(31)
    view = values.view(np.uint32)
    view ^= signs


def _mixed(words: Array) -> Array:
    words = (words ^ (words >> np.uint64(30))) * FIRST
    words = (words ^ (words >> np.uint64(27))) * SECOND
    return np.asarray(words ^ (words >> np.uint64(31)))


def transform(values: Array, spare: Array) -> tuple[Array, Array]:
    """The Walsh-Hadamard transform of ``values`` (flat float32, a power of two of them), not normalised.

    For h = size/2, size/4, … 1 each pair (u, v) at positions p and p + h, where bit h of p is 0, becomes (u + v,
    u - v): Sylvester's matrix, which is symmetric, and twice the transform is ``size`` times the values. The order of
    the additions is thereby fixed, and so is every bit of the result. At 2**16 values it takes 6.5 ns a value; products
    with two Hadamard matrices of 256 x 256 through BLAS, which adds in an order of its own, took 10.

    ``spare`` is another array like ``values``. Both are overwritten; gives the one that holds the result, then the
    other.
    """
    rows = 1 << (values.size.bit_length() - 1) // 2
    columns = values.size // rows
    values, spare = _butterflies(values, spare, rows, columns)
    # Pairs that lie close together would be added a few numbers at a time: transposed, they are a row apart.
    np.copyto(spare.reshape(columns, rows), values.reshape(rows, columns).T)
    values, spare = _butterflies(spare, values, columns, rows)
    np.copyto(spare.reshape(rows, columns), values.reshape(columns, rows).T)
    return spare, values


def _butterflies(values: Array, spare: Array, rows: int, columns: int) -> tuple[Array, Array]:
    """Transform each column of (``rows``, ``columns``)."""
    half = rows // 2
    while half:
        pairs = values.reshape(-1, 2, half * columns)
        result = spare.reshape(pairs.shape)
        np.add(pairs[:, 0], pairs[:, 1], out=result[:, 0])
        np.subtract(pairs[:, 0], pairs[:, 1], out=result[:, 1])
        values, spare = spare, values
        half //= 2
    return values, spare
