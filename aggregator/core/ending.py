"""When a run that is done, or an aggregator that was told to stop, comes to its end."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Ending"]

#: Seconds that a run which is done waits, after a worker's goodbye, for what the worker has evaluated.
LAST_FIGURES = 2.0


@dataclass(slots=True)
class Ending:
    """What is still to be waited for, and whether the end has come; it comes once."""

    done_at: float
    """When the run became done, if it is."""
    left_at: float
    """When a worker last said goodbye."""
    is_stopping: bool = False
    """Whether somebody asked the aggregator to leave: it takes nothing more, and closes no round."""
    was_announced: bool = False
    """Whether the newest version could be sent out under this epoch, which takes a connection."""
    _gave_up: bool = False
    _has_come: bool = False

    def give_up(self) -> None:
        """A checkpoint cannot be written: whoever asked the aggregator to leave must not wait for room on the disk."""
        self._gave_up = self.is_stopping

    def figures_are_late(self, now: float) -> bool:
        """Whether a worker's last figures, which come beside its goodbye and may be later, would be there by now."""
        return now >= self.left_at + LAST_FIGURES

    def come(self, now: float, *, is_settled: bool, is_done: bool, is_alone: bool, linger: float) -> str | None:
        """Why it is over now, ``done`` or ``stopped``; None if it is not, or was before.

        Args:
            now: the time.
            is_settled: all that was taken and decided is durable, and everybody was told.
            is_done: the run is.
            is_alone: nobody is here any more, and nothing is to be heard of those that were.
            linger: seconds after which nobody is waited for.
        """
        reason = None
        if self._gave_up:
            reason = "stopped"  # nothing was acknowledged
        elif is_settled and is_done:
            waited = self.was_announced and (is_alone or now - self.done_at >= linger)
            reason = "done" if self.is_stopping or waited else None
        elif is_settled and self.is_stopping:
            reason = "stopped"
        if self._has_come or reason is None:
            return None
        self._has_come = True
        return reason

    def times(self, linger: float) -> list[float]:
        """When time alone will end a run that is done."""
        return [self.done_at + linger, self.left_at + LAST_FIGURES]
