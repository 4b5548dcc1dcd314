"""``bf16``: the upper half of a float32, rounded to the nearest, ties to even.

Two bytes a value, the whole range of float32 and 8 bits of precision: the relative error of a value is at most
2**-8, and vNMSE about 2.8e-6. Clipped to the largest finite value, 3.39e38. One plane: bfloat16[size].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from broker.codecs.base import planes_for, require_layout, spans
from broker.codecs.halves import narrow, require_finite, widen
from broker.errors import ConfigError
from broker.messages import Array

__all__ = ["Bf16"]


@dataclass(frozen=True, slots=True)
class Bf16:
    """Brain floating point."""

    name: ClassVar[str] = "bf16"
    feedback: ClassVar[bool] = False

    @classmethod
    def of(cls, argument: str) -> Bf16:
        """Raises :class:`ConfigError` if there is an argument."""
        if argument:
            raise ConfigError(f"codec bf16 takes no argument, not {argument!r}")
        return cls()

    def layout(self, size: int) -> tuple[tuple[str, int], ...]:
        """The values."""
        return (("bfloat16", size),)

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
