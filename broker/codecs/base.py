"""What a codec is, and what all codecs need."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import Protocol

import numpy as np
from numpy.typing import DTypeLike

from broker.errors import WireError
from broker.messages import DTYPES, Array, TensorRole, TensorSpec

__all__ = [
    "MIN_ELEMENTS",
    "PIECE",
    "Codec",
    "applies",
    "decoded",
    "planes_for",
    "require_between",
    "require_layout",
    "spans",
]

#: No piece of decoded values has more elements.
PIECE = 2**20

#: Tensors with fewer elements travel as they are: biases and scales of norms, which are few bytes and of which each
#: value counts. Part of the format.
MIN_ELEMENTS = 1024

#: Codecs work in steps of this many elements: 256 KiB, which stays in a core's cache from one pass to the next.
STEP = 2**16

FLOATING = frozenset({"float16", "bfloat16", "float32", "float64"})


class Codec(Protocol):
    """A lossy code for float32 tensors: pure functions, and the same bytes for the same arguments.

    Whatever the codec, decoding gives the same bits on every machine: it is made of single IEEE 754 operations on
    float32, each rounded once, in an order that is written down here; no sum is left to a library (BLAS), which
    adds in an order of its own. (A process in which some library has switched denormal numbers off computes
    differently, everywhere.) Encoding uses float64 sums for scales, whose last bit may depend on numpy's version;
    rounded to float32 they practically never differ.
    """

    @property
    def name(self) -> str:
        """The canonical text: ``codec_of(codec.name) == codec``."""

    @property
    def feedback(self) -> bool:
        """Whether the sender must keep what the codec leaves out, and add it to its next update."""

    def layout(self, size: int) -> tuple[tuple[str, int], ...]:
        """Wire dtype (a key of ``DTYPES``) and number of elements of each plane that ``size`` values become.

        A pure function of the two, so nothing about sizes or positions has to be said, or believed, on the wire.
        """

    def encode(self, values: Array, seed: int) -> tuple[Array, ...]:
        """The planes of ``values`` (flat, float32, finite); ``seed`` in [0, 2**53] is known to both sides.

        Updates that are averaged should have different seeds; the tensors of one update may share theirs.
        """

    def pieces(self, planes: Sequence[Array], size: int, seed: int) -> Iterator[Array]:
        """The decoded values as consecutive flat float32 arrays of at most :data:`PIECE` elements, all finite.

        Each array is overwritten when the next is asked for. The planes may be unaligned read-only views.

        Raises:
            WireError: no encoder gives such planes. Raised by the call itself, before the first piece and before
                anything of the tensor's size is allocated: whoever folds the pieces never has half a tensor.
        """


def applies(spec: TensorSpec) -> bool:
    """Whether a codec is used for ``spec``: a parameter, floating point, of at least MIN_ELEMENTS elements."""
    return spec.role is TensorRole.PARAMETER and spec.dtype in FLOATING and prod(spec.shape) >= MIN_ELEMENTS


def decoded(codec: Codec, planes: Sequence[Array], size: int, seed: int) -> Array:
    """All pieces in one new flat float32 array. Raises :class:`WireError` as they do."""
    pieces = codec.pieces(planes, size, seed)
    values = np.empty(size, np.float32)
    position = 0
    for piece in pieces:
        values[position : position + piece.size] = piece
        position += piece.size
    return values


def planes_for(codec: Codec, size: int) -> tuple[Array, ...]:
    """Planes to be filled."""
    return tuple(np.empty(count, DTYPES[dtype]) for dtype, count in codec.layout(size))


def require_layout(codec: Codec, planes: Sequence[Array], size: int) -> None:
    """Raise :class:`WireError` if ``planes`` have other dtypes, dimensions or lengths than ``codec`` gives."""
    layout = codec.layout(size)
    wanted = [(DTYPES[dtype], (count,)) for dtype, count in layout]
    if [(plane.dtype, plane.shape) for plane in planes] != wanted:
        given = ", ".join(f"{plane.dtype.name}{list(plane.shape)}" for plane in planes) or "nothing"
        named = ", ".join(f"{dtype}[{count}]" for dtype, count in layout)
        raise WireError(f"{codec.name} makes {named} of {size} values, not {given}")


def require_between(codec: Codec, what: str, values: Array, low: float, high: float) -> None:
    """Raise :class:`WireError` if one of ``values`` is NaN or outside of [low, high]."""
    # Minimum and maximum are NaN if one value is, and compare as false then; and they allocate nothing.
    if values.size and not (values.min() >= low and values.max() <= high):
        given = f"{values.min()} to {values.max()}"
        raise WireError(f"{codec.name}: {what} from {given}; an encoder's lie within {low:.6g} to {high:.6g}")


def spans(size: int, dtype: DTypeLike = np.float32, step: int = STEP) -> Iterator[tuple[slice, Array]]:
    """Consecutive slices of at most ``step`` elements that cover ``size``, each with a buffer that they share."""
    buffer = np.empty(min(size, step), dtype)
    for start in range(0, size, step):
        stop = min(start + step, size)
        yield slice(start, stop), buffer[: stop - start]
