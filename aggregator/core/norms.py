"""How long each worker's updates are, and the median over workers: what a usual update looks like.

Each worker has one vote, the median of its last few updates, taken or not. So a fast worker cannot say what is usual:
neither by tiny updates before others have sent any, after which theirs would all be far too long and never be taken,
nor by a flood of long ones. A majority that changes, as by a higher learning rate, is followed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Mapping

__all__ = ["LEAST", "LONGEST", "OWN", "NormWindow"]

#: Workers that have a vote: those heard last. Odd, so that the median is one of them.
LONGEST = 101

#: Updates that a worker's vote is made of.
OWN = 5

#: Before so many have come, none is unusual.
LEAST = 5


class NormWindow:
    """A running median in logarithmic time for each norm."""

    def __init__(self, norms: Mapping[str, tuple[float, ...]] | None = None) -> None:
        """``norms`` by worker, as a checkpoint has them: who was heard last, and what came last, is last."""
        self._norms = dict(norms or {})
        self._votes = sorted(map(_median, self._norms.values()))
        self._count = sum(map(len, self._norms.values()))

    def add(self, worker: str, norm: float) -> None:
        """An update of ``worker`` with this norm has come."""
        before = self._norms.pop(worker, ())
        if before:
            self._forget(before)
        elif len(self._norms) == LONGEST:
            self._forget(self._norms.pop(next(iter(self._norms))))
        own = self._norms[worker] = (*before, norm)[-OWN:]
        self._count += len(own)
        insort(self._votes, _median(own))

    @property
    def median(self) -> float | None:
        """Of the workers, the upper one of two; None while too few updates have come."""
        return self._votes[len(self._votes) // 2] if self._count >= LEAST else None

    def to_plain(self) -> dict[str, tuple[float, ...]]:
        """What :class:`NormWindow` is made from."""
        return dict(self._norms)

    def _forget(self, own: tuple[float, ...]) -> None:
        self._count -= len(own)
        del self._votes[bisect_left(self._votes, _median(own))]


def _median(own: tuple[float, ...]) -> float:
    return sorted(own)[len(own) // 2]
