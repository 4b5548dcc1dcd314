"""Waiting for conditions instead of sleeping."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from broker.transport import Connected, Delivery, Disconnected, Failed, Incoming, Source

T = TypeVar("T")

PATIENCE = 20.0


def wait_for(condition: Callable[[], T], timeout: float = PATIENCE, *, what: str = "the condition") -> T:
    """The first true value of ``condition``; fails after ``timeout`` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"{what} did not come true within {timeout} s"
        time.sleep(0.02)


class Inbox:
    """A sink that keeps what it is given and lets a test wait for it."""

    def __init__(self) -> None:
        self._items: list[Incoming] = []
        self._changed = threading.Condition(threading.RLock())

    def __call__(self, item: Incoming) -> None:
        with self._changed:
            self._items.append(item)
            self._changed.notify_all()

    @property
    def items(self) -> list[Incoming]:
        """All items so far, in order."""
        with self._changed:
            return list(self._items)

    def deliveries(self, source: Source = Source.UPDATE) -> list[Delivery]:
        """The deliveries of one source so far, in order."""
        return [item for item in self.items if isinstance(item, Delivery) and item.source is source]

    def bodies(self, source: Source = Source.UPDATE) -> list[bytes]:
        """The bodies of one source so far, in order."""
        return [delivery.body for delivery in self.deliveries(source)]

    def connections(self) -> list[int]:
        """Generations that stood so far."""
        return [item.generation for item in self.items if isinstance(item, Connected)]

    def losses(self) -> list[Disconnected]:
        """Connections that broke so far."""
        return [item for item in self.items if isinstance(item, Disconnected)]

    def failures(self) -> list[Failed]:
        """Reasons for which the transport stopped."""
        return [item for item in self.items if isinstance(item, Failed)]

    def wait(self, condition: Callable[[], T], timeout: float = PATIENCE) -> T:
        """Wait until ``condition``, looked at after each new item, is true; its value."""
        deadline = time.monotonic() + timeout
        with self._changed:
            while not (value := condition()):
                left = deadline - time.monotonic()
                assert left > 0, f"did not come true within {timeout} s; the inbox holds {self._items}"
                self._changed.wait(left)
            return value

    def wait_delivery(self, number: int = 1, source: Source = Source.UPDATE, timeout: float = PATIENCE) -> Delivery:
        """The delivery with this number (from 1) of a source."""
        self.wait(lambda: len(self.deliveries(source)) >= number, timeout)
        return self.deliveries(source)[number - 1]
