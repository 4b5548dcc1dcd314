"""``fp16``: IEEE half precision, rounded to the nearest, ties to even.

Two bytes a value. 11 bits of precision (vNMSE about 4.3e-8), but between 6.1e-5 and 65504 only: smaller values keep
fewer bits, those under 3e-8 become zero, and larger ones are clipped. Small updates of large models live down there:
prefer ``bf16``, unless the values are known to lie within the range. One plane: float16[size].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from broker.codecs.halves import Half

__all__ = ["Fp16"]


@dataclass(frozen=True, slots=True)
class Fp16(Half):
    """IEEE half precision."""

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[str] = "float16"
