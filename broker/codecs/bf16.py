"""``bf16``: the upper half of a float32, rounded to the nearest, ties to even.

Two bytes a value, the whole range of float32 and 8 bits of precision: the relative error of a value is at most
2**-8, and vNMSE about 2.8e-6. Clipped to the largest finite value, 3.39e38. One plane: bfloat16[size].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from broker.codecs.halves import Half

__all__ = ["Bf16"]


@dataclass(frozen=True, slots=True)
class Bf16(Half):
    """Brain floating point."""

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[str] = "bfloat16"
