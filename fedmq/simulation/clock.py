"""Virtual time: whole microseconds, so that it is the same on every machine, to the last bit."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["NEVER", "seconds_of", "ticks", "ticks_of"]

PER_SECOND = 1_000_000
#: Later than anything that happens.
NEVER = 2**62


def ticks(seconds: float) -> int:
    """``seconds`` in microseconds; :data:`NEVER` if that is beyond any scenario."""
    return min(round(seconds * PER_SECOND), NEVER) if seconds < NEVER / PER_SECOND else NEVER


def ticks_of(seconds: NDArray[Any]) -> NDArray[np.int64]:
    """Durations in microseconds, each at least one.

    A logarithm may differ in its last bit between processors; rounded to microseconds it does not.
    """
    whole = np.rint(np.minimum(seconds, NEVER / PER_SECOND / 4) * PER_SECOND)
    result: NDArray[np.int64] = np.maximum(whole, 1).astype(np.int64)
    return result


def seconds_of(time: int) -> float:
    """``time``, in microseconds, in seconds."""
    return time / PER_SECOND
