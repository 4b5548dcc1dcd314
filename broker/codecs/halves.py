"""Floats of 16 bits: what ``bf16``, ``fp16`` and ``topk`` have in common."""

from __future__ import annotations

import numpy as np

from broker.codecs.base import spans
from broker.errors import WireError
from broker.messages import Array

__all__ = ["narrow", "require_finite", "widen"]

SIGN = np.uint16(0x8000)


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
