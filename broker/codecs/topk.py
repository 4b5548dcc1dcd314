"""``topk:FRACTION``: the largest values by magnitude; all others are left out.

k = ceil(FRACTION * size), at least 1; of equal magnitudes the first. 4 bytes for each value that travels. What is
left out must be kept by the sender and added to its next update (error feedback: Stich et al. 2018, arXiv
1809.07599), or it never arrives: the code alone is biased.

Different from the usual pair of uint32 and float32: an index takes two bytes, since the indices of a segment of
2**16 values are counted from its start, and a value is a bfloat16, whose error is fed back like the rest (float16
would lose small values for ever, and clip large ones).

Planes: int32[ceil(size / 2**16)] how many values each segment has; int16[k] their indices in the segment, as
unsigned numbers, rising within a segment; bfloat16[k] the values in the same order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar

import numpy as np

from broker.codecs.base import planes_for, require_layout, spans
from broker.codecs.halves import narrow, require_finite
from broker.errors import ConfigError, WireError
from broker.messages import Array

__all__ = ["TopK"]

SEGMENT = 2**16
MAGNITUDE = np.uint32(0x7FFFFFFF)


@dataclass(frozen=True, slots=True)
class TopK:
    """The largest values by magnitude. ``fraction``: how many of all, above 0 and at most 1."""

    fraction: float = 0.01
    feedback: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.fraction <= 1:
            raise ConfigError(f"codec topk takes a fraction above 0 and at most 1, like topk:0.01, not {self.fraction}")

    @classmethod
    def of(cls, argument: str) -> TopK:
        """Raises :class:`ConfigError` if ``argument`` is no fraction."""
        try:
            return cls(float(argument)) if argument else cls()
        except ValueError:
            raise ConfigError(f"codec topk takes a fraction, like topk:0.01, not {argument!r}") from None

    @property
    def name(self) -> str:
        """``topk:0.01``."""
        return f"topk:{self.fraction!r}"

    def count(self, size: int) -> int:
        """How many of ``size`` values travel."""
        return min(size, max(1, ceil(self.fraction * size)))

    def layout(self, size: int) -> tuple[tuple[str, int], ...]:
        """Counts, indices and values."""
        count = self.count(size)
        return (("int32", -(-size // SEGMENT)), ("int16", count), ("bfloat16", count))

    def encode(self, values: Array, seed: int) -> tuple[Array, ...]:
        """The largest, in order of their position; nothing is random."""
        del seed
        counts, indices, kept = planes = planes_for(self, values.size)
        if not values.size:
            return planes
        threshold, ties = _threshold(values, kept.size)
        position = 0
        for segment, (span, bits) in enumerate(_magnitudes(values)):
            wanted = bits > threshold
            tied = np.flatnonzero(bits == threshold)[:ties]
            ties -= tied.size
            wanted[tied] = True
            found = np.flatnonzero(wanted)
            part = slice(position, position + found.size)
            counts[segment] = found.size
            indices.view(np.uint16)[part] = found
            narrow(values[span][found], kept[part])
            position = part.stop
        return planes

    def pieces(self, planes: Sequence[Array], size: int, seed: int) -> Iterator[Array]:
        """Zeros, and the values where they belong.

        Raises :class:`WireError` for counts that do not add up, indices that do not rise or lie outside, and values
        that are not finite.
        """
        del seed
        require_layout(self, planes, size)
        counts, indices, values = planes[0], planes[1].view(np.uint16), planes[2]
        if counts.size and counts.min() < 0:
            raise WireError(f"{self.name}: a segment has {counts.min()} values")
        if (total := int(counts.sum(dtype=np.int64))) != indices.size:
            raise WireError(f"{self.name}: the segments have {total} values, and there are {indices.size}")
        for span, part in _segments(counts, size):
            _require_rising(self.name, indices[part], span.stop - span.start)
        require_finite(self.name, values)
        return _scattered(_segments(counts, size), indices, values, size)


def _scattered(segments: Iterator[tuple[slice, slice]], indices: Array, values: Array, size: int) -> Iterator[Array]:
    buffer = np.empty(min(size, SEGMENT), np.float32)
    for span, part in segments:
        piece = buffer[: span.stop - span.start]
        piece.fill(0)
        piece[indices[part]] = values[part]
        yield piece


def _segments(counts: Array, size: int) -> Iterator[tuple[slice, slice]]:
    """Where each segment's values belong, and where its indices stand."""
    position = 0
    for segment, count in enumerate(counts.tolist()):
        start = segment * SEGMENT
        yield slice(start, min(start + SEGMENT, size)), slice(position, position + count)
        position += count


def _require_rising(name: str, indices: Array, length: int) -> None:
    if indices.size and not (indices[-1] < length and np.all(indices[1:] > indices[:-1])):
        raise WireError(f"{name}: the indices of a segment of {length} values do not rise from 0 to {length - 1}")


def _magnitudes(values: Array) -> Iterator[tuple[slice, Array]]:
    """The bits of |values| in segments: as whole numbers they are in the same order as the magnitudes."""
    for span, buffer in spans(values.size, np.uint32, SEGMENT):
        yield span, np.bitwise_and(values[span].view(np.uint32), MAGNITUDE, out=buffer)


def _threshold(values: Array, count: int) -> tuple[int, int]:
    """The magnitude (its bits) of the ``count``-th largest value, and how many of that magnitude are among them.

    Two histograms, over the upper and over the lower 16 bits: linear whatever the values are, and no copy of them.
    """
    upper = np.zeros(2**15, np.int64)
    for _span, bits in _magnitudes(values):
        upper += np.bincount(bits >> np.uint32(16), minlength=upper.size)
    top, left = _bin(upper, count)
    lower = np.zeros(2**16, np.int64)
    for _span, bits in _magnitudes(values):
        inside = bits[bits >> np.uint32(16) == top]
        lower += np.bincount(inside & np.uint32(0xFFFF), minlength=lower.size)
    bottom, ties = _bin(lower, left)
    return top << 16 | bottom, ties


def _bin(histogram: Array, count: int) -> tuple[int, int]:
    """The bin in which the ``count``-th from the top lies, and how many of that bin are needed."""
    from_top = np.cumsum(histogram[::-1])
    place = int(np.searchsorted(from_top, count))
    above = int(from_top[place - 1]) if place else 0
    return histogram.size - 1 - place, count - above
