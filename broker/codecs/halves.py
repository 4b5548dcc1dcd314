"""Floats of 16 bits: what ``bf16``, ``fp16`` and ``topk`` have in common."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np

from broker.codecs.base import planes_for, require_layout, spans
from broker.errors import ConfigError, WireError
from broker.messages import Array

__all__ = ["Half", "narrow", "require_finite", "widen"]

SIGN = np.uint16(0x8000)


@dataclass(frozen=True, slots=True)
class Half:
    """A codec that rounds each value to one of 16 bits; a subclass says to which."""

    name: ClassVar[str]
    dtype: ClassVar[str]
    """A key of ``DTYPES``."""
    feedback: ClassVar[bool] = False

    @classmethod
    def of(cls, argument: str) -> Self:
        """Raises :class:`ConfigError` if there is an argument."""
        if argument:
            raise ConfigError(f"codec {cls.name} takes no argument, not {argument!r}")
        return cls()

    def layout(self, size: int) -> tuple[tuple[str, int], ...]:
        """The values."""
        return ((self.dtype, size),)

    def encode(self, values: Array, seed: int) -> tuple[Array, ...]:
        """Rounded; nothing is random."""
        del seed
        (plane,) = planes = planes_for(self, values.size)
        narrow(values, plane)
        return planes

    def pieces(self, planes: Sequence[Array], size: int, seed: int) -> Iterator[Array]:
        """Exactly what was encoded. Raises :class:`WireError` for a value that is not finite."""
        del seed
        require_layout(self, planes, size)
        (plane,) = planes
        require_finite(self.name, plane)
        return (widen(plane[span], buffer) for span, buffer in spans(size))


def narrow(values: Array, out: Array) -> None:
    """Round ``values`` (float32) to the nearest in ``out`` (float16 or bfloat16), ties to even.

    Clipped to the largest finite value: those above would become infinite.
    """
    largest = (_infinity(out) - np.uint16(1)).view(out.dtype).astype(np.float32)
    for span, clipped in spans(values.size):
        out[span] = np.clip(values[span], -largest, largest, out=clipped)


def widen(halves: Array, out: Array) -> Array:
    """``halves`` (float16 or bfloat16) as float32 in ``out``, which is given back. Exact."""
    out[:] = halves
    return out


def require_finite(name: str, halves: Array) -> None:
    """Raise :class:`WireError` if one of ``halves`` is NaN or infinite."""
    # Without its sign, the bits of what is not finite are a number at least that of infinity.
    infinity = _infinity(halves)
    for span, buffer in spans(halves.size, np.uint16):
        np.bitwise_and(halves[span].view(np.uint16), ~SIGN, out=buffer)
        if buffer.max() >= infinity[0]:
            raise WireError(f"{name}: a value is not finite")


def _infinity(like: Array) -> Array:
    """The bits of infinity; one less are those of the largest finite value."""
    return np.array([np.inf], like.dtype).view(np.uint16)
