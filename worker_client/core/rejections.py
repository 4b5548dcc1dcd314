"""How many of a worker's updates were rejected in a row, and how long it rests for it."""

from __future__ import annotations

from broker.messages import Reason

__all__ = ["LONGEST_REST", "MOST_NOT_FINITE", "Rejections"]

FIRST_REST = 1.0
LONGEST_REST = 60.0
#: So many updates in a row that hold NaN or infinity: training does not come back from that by itself.
MOST_NOT_FINITE = 10

#: These lie in the course of the run and not in what the update holds; the next one may be taken.
TIMELY = frozenset(
    {
        Reason.RUN_DONE,
        Reason.TOO_STALE,
        Reason.ROUND_CLOSED,
        Reason.SECOND_IN_ROUND,
        Reason.WORKER_SHARE,
        Reason.ROLLED_BACK,
    }
)


class Rejections:
    """The rejections of one incarnation's updates, as far as they are told.

    An update between two rejected ones of which nothing was told counts as taken, so that a lost notice makes
    the worker less patient with nobody: it begins to count anew.
    """

    def __init__(self) -> None:
        self.in_a_row = 0
        self._not_finite = 0
        self._last = -1

    def add(self, reason: Reason, seq: int) -> bool:
        """Count the rejection of update ``seq``; whether the worker has to rest for it."""
        if seq <= self._last:  # told twice, or replayed from the dead letters
            return False
        if seq != self._last + 1:
            self.in_a_row = self._not_finite = 0
        self._last = seq
        if reason in TIMELY:
            return False
        self.in_a_row += 1
        self._not_finite += reason is Reason.NOT_FINITE
        return True

    @property
    def rest(self) -> float:
        """Seconds, before they are spread."""
        return min(LONGEST_REST, FIRST_REST * 2.0 ** min(self.in_a_row - 1, 10))

    @property
    def has_diverged(self) -> bool:
        """Whether so many in a row were not finite that going on is pointless."""
        return self._not_finite >= MOST_NOT_FINITE
