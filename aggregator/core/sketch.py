"""How well an update agrees with what its round made of it: cosines, from a few thousand numbers of each.

An update is gone when it has been folded, and what it is to be compared with is there only when its round closes. So
a sketch of it is kept until then: a sample of its elements, stratified by tensor, and of that a count sketch
(Charikar, Chen & Farach-Colton 2002): each element of the sample gets a random sign and is added to one of
:data:`BUCKETS` sums. Sums of products of two sketches are those of the updates in the mean; the cosine c of two
updates comes out with a standard deviation of about ``(1 - c**2) / sqrt(BUCKETS)``, 0.03 at most, and exactly for
models of no more than :data:`BUCKETS` parameters. Updates whose length is in very few of the elements of a large
tensor may be missed by the sample.

The same elements and signs for all updates of a run, also after a restart and in a replay: there is no seed.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from aggregator.core.snapshot import Entry
from broker.codecs.hadamard import flip_signs
from broker.messages import Array, ModelSpec, TensorRole, TensorSpec, Values, pieces

__all__ = ["BUCKETS", "LIMIT", "Sketcher", "Sketches"]

#: Numbers of a sketch.
BUCKETS = 1024
#: Elements of a sample, about: half of them in proportion to the tensors' sizes, half the same for each tensor, since
#: small tensors often move most.
SAMPLE = 8192
#: Updates of a round of which sketches are kept: 16 MiB. Those that come after them have no cosine.
LIMIT = 4096

_SEED = 0
#: Sketches whose cosines are calculated together: 2 MiB.
_TOGETHER = 256
#: The golden ratio's fraction: multiples of it fill the unit interval evenly.
_FRACTION = (math.sqrt(5) - 1) / 2


class Sketcher:
    """Makes the sketches of a model's updates, and of aggregates of them: of what trains, not of statistics.

    Not for several threads.
    """

    def __init__(self, model: ModelSpec) -> None:
        tensors = [tensor for tensor in model.tensors if tensor.role is TensorRole.PARAMETER]
        total = sum(_size(tensor) for tensor in tensors)
        self._places: dict[str, tuple[slice, Array | None]] = {}
        scales: list[float] = []
        counts: list[int] = []
        for tensor in tensors:
            start, size = sum(counts), _size(tensor)
            wanted = math.ceil(SAMPLE / 2 * (size / max(1, total) + 1 / len(tensors)))
            count = size if size <= 2 * wanted else wanted
            counts.append(count)
            scales.append(math.sqrt(size / max(1, count)))
            self._places[tensor.name] = slice(start, start + count), None if count == size else _spread(count, size)
        self.size = min(sum(counts), BUCKETS)
        """Numbers of a sketch."""
        rows = -(-sum(counts) // max(1, self.size))
        self._sample = np.zeros(rows * self.size, np.float32)
        self._scales: Array | None = None
        if rows > 1:  # else each element has a bucket of its own, and products are exact
            self._scales = np.ones_like(self._sample)
            self._scales[: sum(counts)] = np.repeat(np.array(scales, np.float32), counts)
            flip_signs(self._scales, _SEED, 0)

    def watch(self, tensors: Mapping[str, Values]) -> Mapping[str, Values]:
        """``tensors`` to be folded, which a sketch is then there of (:meth:`sketch`).

        Values that come in pieces, as those that are decoded on the way, are looked at when somebody reads them.
        """
        self._sample.fill(0.0)
        in_pieces: dict[str, Values] = {}
        for name in self._places:
            values = tensors[name]
            if isinstance(values, np.ndarray | np.generic):
                self.take(name, 0, np.asarray(values).reshape(-1))
            else:
                in_pieces[name] = _Watched(self, name, values)
        return {**tensors, **in_pieces} if in_pieces else tensors

    def take(self, name: str, start: int, values: Array) -> None:
        """Of the tensor ``name``, flat ``values`` from its element ``start`` on."""
        place, indices = self._places[name]
        sample, stop = self._sample[place], start + values.size
        if indices is not None:
            first, last = np.searchsorted(indices, (start, stop))
            chosen = indices[first:last] - start if start else indices[first:last]
            if values.dtype == np.float32:
                np.take(values, chosen, out=sample[first:last], mode="clip")  # any other mode takes a second copy
                return
            values, start, stop = values[chosen], first, last
        if values.dtype == np.float32:
            sample[start:stop] = values
        else:
            with np.errstate(over="ignore"):
                sample[start:stop] = values

    def sketch(self) -> Array:
        """Of what was watched last, and read meanwhile: shape (size,), float32."""
        if self._scales is None:
            return self._sample.copy()
        with np.errstate(over="ignore", invalid="ignore"):
            signed = self._sample * self._scales
            return np.asarray(signed.reshape(-1, self.size).sum(axis=0))

    def of(self, tensors: Mapping[str, Array]) -> Array:
        """The sketch of whole ``tensors``."""
        self.watch(tensors)
        return self.sketch()


class _Watched:
    """A tensor in pieces (:class:`broker.messages.Pieces`) that are looked at on their way."""

    def __init__(self, sketcher: Sketcher, name: str, values: Any) -> None:
        self.shape: tuple[int, ...] = values.shape
        self.dtype: np.dtype[Any] = values.dtype
        self.is_finite: bool = values.is_finite
        self._sketcher, self._name, self._values = sketcher, name, values

    def pieces(self) -> Iterator[Array]:
        start = 0
        for piece in pieces(self._values):
            self._sketcher.take(self._name, start, piece)
            start += piece.size
            yield piece


class Sketches:
    """Those of the updates of one round, in their order."""

    def __init__(self, sketcher: Sketcher, rows: Sequence[Array] = (), entries: int = 0) -> None:
        """Go on from ``rows``, as a checkpoint has them that lists ``entries`` updates."""
        self._sketcher = sketcher
        fits = len(rows) <= entries and all(row.shape == (sketcher.size,) for row in rows)
        self._rows = list(rows) if fits else []
        # A checkpoint of before has none, and one of another release may have others.
        unknown = min(entries, LIMIT) - len(self._rows)
        self._rows += [np.full(sketcher.size, np.nan, np.float32)] * unknown

    def __len__(self) -> int:
        """Updates of which there is one."""
        return len(self._rows)

    @property
    def rows(self) -> tuple[Array, ...]:
        """For a checkpoint; none is ever written into."""
        return tuple(self._rows)

    def watch(self, tensors: Mapping[str, Values]) -> Mapping[str, Values]:
        """See :meth:`Sketcher.watch`."""
        return self._sketcher.watch(tensors) if len(self._rows) < LIMIT else tensors

    def add(self) -> None:
        """What was watched last was folded."""
        if len(self._rows) < LIMIT:
            self._rows.append(self._sketcher.sketch())

    def marked(
        self, entries: Sequence[Entry], aggregate: Mapping[str, Array], origin: Mapping[str, Array] | None = None
    ) -> tuple[Entry, ...]:
        """``entries`` with the cosines of their updates with ``aggregate``, which is not written into.

        Args:
            entries: of this round.
            aggregate: what the strategy made of the updates.
            origin: where updates are parameters, those that the step starts from: what counts is the way from there.
        """
        if not self._rows:
            return tuple(entries)
        start = 0.0 if origin is None else self._sketcher.of(origin).astype(np.float64)
        whole = self._sketcher.of(aggregate).astype(np.float64) - start
        parts = (self._rows[first : first + _TOGETHER] for first in range(0, len(self._rows), _TOGETHER))
        cosines = [cosine for rows in parts for cosine in _cosines(np.array(rows, np.float64) - start, whole)]
        cosines += [None] * (len(entries) - len(cosines))
        return tuple(replace(entry, cosine=cosine) for entry, cosine in zip(entries, cosines, strict=True))


def _cosines(rows: Array, other: Array) -> list[float | None]:
    """Of each row with ``other``, rounded to six digits, since no more are known; None if there is none.

    Sums by numpy, not by BLAS, whose order of additions is the machine's own.
    """
    with np.errstate(all="ignore"):
        norms = np.sqrt((rows * rows).sum(axis=1)) * math.sqrt(float((other * other).sum()))
        found = np.clip((rows * other).sum(axis=1) / norms, -1.0, 1.0)
    return [round(cosine, 6) if math.isfinite(cosine) else None for cosine in found.tolist()]


def _size(tensor: TensorSpec) -> int:
    return math.prod(tensor.shape)


def _spread(count: int, size: int) -> Array:
    """``count`` of the numbers below ``size``, which is more than twice as much: one in each stretch, ascending."""
    steps = np.arange(count, dtype=np.float64)
    places = (steps + steps * _FRACTION % 1.0) * (size / count)
    return np.minimum(places.astype(np.int64), size - 1)
