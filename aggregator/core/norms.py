"""The norms of the updates that were taken last, and their median: what a usual update looks like."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque
from collections.abc import Iterable

__all__ = ["LEAST", "NormWindow"]

#: Norms that are remembered. Odd, so that the median is one of them.
LONGEST = 101

#: Before so many were taken, none is unusual.
LEAST = 5


class NormWindow:
    """A running median in logarithmic time for each norm."""

    def __init__(self, norms: Iterable[float] = ()) -> None:
        """``norms`` as a checkpoint has them, in the order in which they came."""
        self._norms = deque(norms, LONGEST)
        self._sorted = sorted(self._norms)

    def add(self, norm: float) -> None:
        """An update with this norm was taken."""
        if len(self._norms) == LONGEST:
            del self._sorted[bisect_left(self._sorted, self._norms[0])]
        self._norms.append(norm)
        insort(self._sorted, norm)

    @property
    def median(self) -> float | None:
        """Of the last ones, the upper one of two; None while there are too few."""
        return self._sorted[len(self._sorted) // 2] if len(self._sorted) >= LEAST else None

    def to_plain(self) -> tuple[float, ...]:
        """What :class:`NormWindow` is made from."""
        return tuple(self._norms)
