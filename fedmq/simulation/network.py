"""Between a worker and the queue: time, losses and repetitions.

Nothing is lost for ever: a publish that the broker did not confirm is published again under the same id, as the real
worker does. If the publish was lost, the update is late; if only its confirm was, it comes twice.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from fedmq.simulation.aggregator import Letter
from fedmq.simulation.clock import ticks
from fedmq.simulation.randomness import drawn, stream
from fedmq.simulation.scenario import NetworkTable

__all__ = ["Mailbox", "Network"]

#: Doublings of the pause before an update is published again.
MOST_DOUBLINGS = 6


class Mailbox(Protocol):
    """Whoever takes what arrives."""

    def schedule(self, time: int, what: Callable[[int], None]) -> None:
        """Call ``what`` with the time at ``time``."""

    def sent(self, nbytes: int) -> None:
        """Bytes that went over the worker's line."""

    def arrived(self, letter: Letter, now: int) -> None:
        """The broker has ``letter``."""


class Network:
    """What ``[network]`` says."""

    def __init__(self, table: NetworkTable, seed: int) -> None:
        self._table = table
        self._chance = drawn(stream(seed, "network").random)
        self.delay = ticks(table.latency)
        """That a message takes, its size apart."""
        self._is_perfect = not (table.loss or table.duplicates)
        self._is_instant = self._is_perfect and not self.delay and table.bandwidth is None

    def download(self, nbytes: int) -> int:
        """How long a version of this size takes on a worker's line, its latency apart."""
        return self._transfer(nbytes)

    def send(self, letter: Letter, now: int, mailbox: Mailbox) -> None:
        """Publish ``letter`` until it is confirmed."""
        if self._is_instant:
            mailbox.sent(letter.nbytes)
            mailbox.arrived(letter, now)
            return
        time, pause = now, ticks(self._table.retry_seconds)
        longest = pause << MOST_DOUBLINGS
        while True:
            mailbox.sent(letter.nbytes)
            time += self._transfer(letter.nbytes)
            if self._is_perfect or next(self._chance) >= self._table.loss:
                mailbox.schedule(time + self.delay, lambda then: mailbox.arrived(letter, then))
                if self._is_perfect or next(self._chance) >= self._table.duplicates:
                    return
            time += pause
            pause = min(2 * pause, longest)

    def _transfer(self, nbytes: int) -> int:
        return 0 if self._table.bandwidth is None else ticks(nbytes / self._table.bandwidth)
