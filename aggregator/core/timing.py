"""Where time may be taken. The core has no clock; whoever has one puts it here."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

__all__ = ["Timing"]

NOTHING: AbstractContextManager[object] = nullcontext()


@dataclass(frozen=True, slots=True)
class Timing:
    """What surrounds a machine's work; by default nothing."""

    fold: AbstractContextManager[object] = NOTHING
    """An update goes into the buffer."""
    step: AbstractContextManager[object] = NOTHING
    """The buffer becomes the next version."""
