"""A data section that is not in one place: the sender's tensors as they lie, or chunks as they came."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import accumulate
from typing import Any

import numpy as np

from broker.errors import WireError
from broker.messages import DTYPES, Array, TensorSpec

__all__ = ["Section", "Spread"]


class Section:
    """Consecutive parts, read as if they were one; nothing is copied."""

    def __init__(self, parts: Iterable[memoryview]) -> None:
        self._parts = [part for part in parts if part.nbytes]
        self._ends = list(accumulate(part.nbytes for part in self._parts))

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self._ends[-1] if self._ends else 0

    def views(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes from ``start`` to ``stop``, as views of the parts that they lie in."""
        index = bisect_right(self._ends, start)
        while start < stop:
            begin = self._ends[index] - self._parts[index].nbytes
            view = self._parts[index][start - begin : stop - begin]
            yield view
            start += view.nbytes
            index += 1

    def tensor(self, spec: TensorSpec, start: int) -> Array | Spread:
        """The tensor that begins at ``start``: an array, or :class:`Spread` where it lies in several parts.

        Raises :class:`WireError` for a shape that no array has.
        """
        dtype = DTYPES[spec.dtype]
        flats = [_flat(view, dtype) for view in self.views(start, start + spec.nbytes)]
        if len(flats) > 1:
            return Spread(spec.shape, dtype, flats)
        try:
            array = (flats[0] if flats else np.empty(0, dtype)).reshape(spec.shape)
        except ValueError as error:
            # Dimensions that no array has, beside a zero that makes their product small.
            raise WireError(f"{spec.name}: {error}") from None
        array.flags.writeable = False
        return array


class Spread:
    """A tensor over several chunks; see :class:`broker.messages.Pieces`."""

    is_finite = False

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any], flats: list[Array]) -> None:
        self.shape = shape
        self.dtype = dtype
        self._flats = flats

    def pieces(self) -> Iterator[Array]:
        """The elements in C order, as flat arrays."""
        yield from self._flats


def _flat(view: memoryview, dtype: np.dtype[Any]) -> Array:
    if view.nbytes % dtype.itemsize:
        raise WireError("a chunk ends in the middle of an element: all but the last are multiples of 64 bytes")
    # By way of bytes: not every dtype (bfloat16) is known to the buffer protocol.
    array: Array = np.frombuffer(view, dtype=np.uint8).view(dtype)
    array.flags.writeable = False
    return array
