"""The updates of a round side by side, for rules that need all of them: median, Krum and the like.

A row is one update's parameters (statistics and counters are no steps, and are averaged), flattened and put one after
the other in the model's order, in float32, or in float64 if the model has any. A rule sees rows **weighted**: times
the staleness weight with which the update goes in, so that their mean is what FedBuff would apply.

Where rows are kept is not the strategy's business: in memory here, for tests, simulation and replay; on disk in
production, where as many models as a round has updates would not fit into memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np

from broker.messages import Array, ModelSpec, TensorRole, Update, pieces

__all__ = ["BLOCK_BYTES", "GrowingRows", "MemoryRows", "MemorySpool", "Rows", "Spool", "columns", "row_of", "row_shape"]

#: Of a block, all rows together. Reading and sorting are as fast from 1 MiB on; a rule may need a few times as much.
BLOCK_BYTES = 8 * 2**20


class Rows(Protocol):
    """K updates of one round, in the order in which they came."""

    @property
    def count(self) -> int:
        """K."""

    @property
    def size(self) -> int:
        """Elements of a row."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is read: float32 or float64."""

    @property
    def weights(self) -> tuple[float, ...]:
        """The staleness weight of each row. :meth:`block` and :meth:`row` have multiplied by it."""

    @property
    def workers(self) -> tuple[str, ...]:
        """Whose update each row is; one worker may have several in a buffered round."""

    def block(self, start: int, stop: int) -> Array:
        """Elements ``start`` to ``stop`` of all rows, weighted: shape (K, stop - start), the caller's own.

        See :func:`columns`. Raises :class:`CheckpointError` if the rows are on a disk that does not give them.
        """

    def row(self, index: int) -> Array:
        """One whole row, weighted: shape (size,), the caller's own. It takes the memory of a model. Raises likewise."""


@runtime_checkable
class GrowingRows(Rows, Protocol):
    """The rows of a round that is open."""

    def append(self, values: Iterable[Array], weight: float, worker: str) -> None:
        """Add a row.

        Args:
            values: all elements, flat, in consecutive pieces of any length and of any dtype that float32 or float64
                can hold; each is read before the next is asked for.
            weight: the staleness weight.
            worker: whose update it is.

        Raises:
            ValueError: these are not as many elements as a row has; nothing was added.
            CheckpointNotWritten: there is no room; nothing was added.
        """

    def lend(self) -> Rows:
        """The rows that there are now; whoever has it does not see those that are added later."""


class Spool(Protocol):
    """Where the rows of rounds are kept."""

    def begin(self, model: ModelSpec) -> GrowingRows:
        """No row yet, of updates to ``model``."""

    def resume(self, rows: Rows) -> GrowingRows:
        """``rows``, as a checkpoint has them, and room for more."""


class MemoryRows:
    """Rows in memory: one model's worth for each."""

    def __init__(self, size: int, dtype: np.dtype[Any]) -> None:
        """No row yet.

        Args:
            size: elements of a row.
            dtype: in which rows are kept and read.
        """
        self.size = size
        self.dtype = dtype
        self.weights: tuple[float, ...] = ()
        self.workers: tuple[str, ...] = ()
        self._rows: tuple[Array, ...] = ()

    @property
    def count(self) -> int:
        """Rows."""
        return len(self._rows)

    def append(self, values: Iterable[Array], weight: float, worker: str) -> None:
        """Add a copy of ``values``. See :class:`GrowingRows`."""
        row, end = np.empty(self.size, self.dtype), 0
        for piece in values:
            begin, end = end, end + piece.size
            if end > self.size:
                break
            row[begin:end] = piece
        if end != self.size:
            raise ValueError(f"a row has {self.size} elements, and there are {end} or more")
        self._rows, self.weights, self.workers = (*self._rows, row), (*self.weights, weight), (*self.workers, worker)

    def lend(self) -> MemoryRows:
        """The rows of now. No array is copied, and none is ever written into."""
        lent = MemoryRows(self.size, self.dtype)
        lent._rows, lent.weights, lent.workers = self._rows, self.weights, self.workers
        return lent

    def block(self, start: int, stop: int) -> Array:
        """See :class:`Rows`."""
        block = np.empty((self.count, len(range(self.size)[start:stop])), self.dtype)
        for index, (row, weight) in enumerate(zip(self._rows, self.weights, strict=True)):
            np.multiply(row[start:stop], weight, out=block[index], dtype=self.dtype)
        return block

    def row(self, index: int) -> Array:
        """See :class:`Rows`."""
        return np.multiply(self._rows[index], self.weights[index], dtype=self.dtype)


class MemorySpool:
    """Keeps rows in memory."""

    def begin(self, model: ModelSpec) -> MemoryRows:
        """See :class:`Spool`."""
        return MemoryRows(*row_shape(model))

    def resume(self, rows: Rows) -> MemoryRows:
        """See :class:`Spool`. ``rows`` must be in memory as well: values that were weighted are not those that came."""
        if not isinstance(rows, MemoryRows):
            raise TypeError(f"rows in memory cannot go on from {type(rows).__name__}")
        return rows.lend()


def columns(rows: Rows, nbytes: int = BLOCK_BYTES) -> Iterator[tuple[int, int]]:
    """``start`` and ``stop`` of consecutive blocks over all elements, each of ``nbytes`` or less, or one column."""
    width = max(1, nbytes // (max(1, rows.count) * rows.dtype.itemsize))
    for start in range(0, rows.size, width):
        yield start, min(start + width, rows.size)


def row_shape(model: ModelSpec) -> tuple[int, np.dtype[Any]]:
    """Elements and dtype of a row."""
    tensors = [tensor for tensor in model.tensors if tensor.role is TensorRole.PARAMETER]
    wide = any(tensor.dtype == "float64" for tensor in tensors)
    return sum(math.prod(tensor.shape) for tensor in tensors), np.dtype(np.float64 if wide else np.float32)


def row_of(update: Update, model: ModelSpec) -> Iterator[Array]:
    """The elements of ``update``'s row, in pieces; nothing is copied, or weighted."""
    for tensor in model.tensors:
        if tensor.role is TensorRole.PARAMETER:
            yield from pieces(update.tensors[tensor.name])
