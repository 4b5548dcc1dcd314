"""How the aggregator's process is set up for large messages; best effort, and without effect on what it computes."""

from __future__ import annotations

import contextlib
import ctypes
import sys

__all__ = ["tune"]

#: Python lets a thread run for so long while others wait. The thread that reads from the broker is held up by the one
#: that folds, for half a millisecond instead of five.
SWITCH_SECONDS = 0.0005
#: Blocks of this size and more are taken from the system and given back to it, each by itself. By itself glibc raises
#: the limit to 32 MiB once it has seen such a block go, and keeps what is smaller in heaps with holes.
MMAP_BYTES = 1 << 20
#: ``M_MMAP_THRESHOLD`` in glibc's malloc.h.
M_MMAP_THRESHOLD = -3


def tune() -> None:
    """Set up this process. Where the C library is another, memory is left as it is."""
    sys.setswitchinterval(SWITCH_SECONDS)
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, MMAP_BYTES)
