"""Waiting for memory: an update is not taken in beside what will let go of some in a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import wait

from aggregator.broadcasts import Announcer
from aggregator.core import events as on
from aggregator.core.machine import RoundMachine
from aggregator.writing import Writing

__all__ = ["Room"]

#: How long an update waits until a checkpoint lets go of memory, and one second more for each so many bytes of model;
#: far below the minute after which health checks think that it hangs. If the disk takes longer, memory is taken.
WAIT_SECONDS = 1.0
WAIT_BYTES = 250e6
MAX_WAIT_SECONDS = 10.0
#: So much longer than a disk may a broker take, over a network; at most so many seconds.
SENDING = 3.0
MAX_SENDING_SECONDS = 60.0
#: Between two looks whether to wait on, in seconds.
LOOK_SECONDS = 1.0
#: Below this size of a model, in bytes, copying takes less than waiting.
LARGE = 16 * 2**20


class Room:
    """Waits until there is room for an update of a large model, but never for ever.

    Args:
        announcer: knows which versions are being sent.
        handle: has the machine handle an event.
        is_over: called about once a second; whether to wait no longer.
    """

    def __init__(
        self,
        announcer: Announcer,
        handle: Callable[[on.Happening, RoundMachine], None],
        is_over: Callable[[], bool],
    ) -> None:
        self.writing: Writing | None = None
        """The checkpoint that is on its way to the disk, if it has not been waited for yet."""
        self._announcer = announcer
        self._handle = handle
        self._is_over = is_over
        self._awaited = -1

    def wait(self, machine: RoundMachine) -> None:
        """Call it before ``machine`` is given an update."""
        if machine.model.nbytes >= LARGE:
            self._await_disk(machine)
            self._await_broadcast(machine)

    def _await_disk(self, machine: RoundMachine) -> None:
        """Give the checkpoint on its way some time, lest the next update takes the memory of another model.

        It could be taken in at once: the machine copies the accumulator while that is read, and begins another one
        beside two versions of the parameters. What is heard of here the inbox has, too, but behind others.
        """
        writing = self.writing
        if writing is None or not (machine.lends or machine.trails):
            return
        self.writing = None  # once: updates that are not folded would wait as well
        patience = min(_seconds(machine), MAX_WAIT_SECONDS)
        if machine.lends and writing.is_copied.wait(patience):
            self._handle(on.CheckpointCopied(writing.commit), machine)
        elif machine.trails and wait([writing.outcome], patience).done and not writing.outcome.exception():
            outcome = writing.outcome.result()
            if outcome is not None:
                self._handle(outcome, machine)

    def _await_broadcast(self, machine: RoundMachine) -> None:
        """Give an older version that is being sent some time, before a round takes memory beside it and its successor.

        Not for ever: a broker that is short of memory waits for what is acknowledged.
        """
        if machine.fill or machine.version == self._awaited:
            return
        self._awaited = machine.version  # once for each
        deadline = time.monotonic() + min(SENDING * _seconds(machine), MAX_SENDING_SECONDS)
        while not self._announcer.wait(LOOK_SECONDS, before=machine.version):
            if self._is_over() or time.monotonic() > deadline:
                return


def _seconds(machine: RoundMachine) -> float:
    """How long an update of this model's size may wait for a disk."""
    return WAIT_SECONDS + machine.model.nbytes / WAIT_BYTES
