"""``fp16``: IEEE half precision, rounded to the nearest, ties to even.

Two bytes a value. 11 bits of precision (vNMSE about 4.3e-8), but between 6.1e-5 and 65504 only: smaller values keep
fewer bits, those under 3e-8 become zero, and larger ones are clipped. Small updates of large models live down there:
prefer ``bf16``, unless the values are known to lie within the range. One plane: float16[size].
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar

from broker.codecs.base import planes_for, require_layout, spans
from broker.codecs.halves import narrow, require_finite, widen
from broker.errors import ConfigError
from broker.messages import Array

__all__ = ["Fp16"]


@dataclass(frozen=True, slots=True)
class Fp16:
    """IEEE half precision."""

    name: ClassVar[str] = "fp16"
    feedback: ClassVar[bool] = False

    @classmethod
    def of(cls, argument: str) -> Fp16:
        """Raises :class:`ConfigError` if there is an argument."""
        if argument:
            raise ConfigError(f"codec fp16 takes no argument, not {argument!r}")
        return cls()

    def layout(self, size: int) -> tuple[tuple[str, int], ...]:
        """The values."""
        return (("float16", size),)

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
