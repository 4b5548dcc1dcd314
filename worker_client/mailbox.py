"""What reaches a worker's loop from other threads, and the thread that trains."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from broker.transport import Delivery, Incoming, Source, order_of

__all__ = ["Bench", "Finished", "Item", "Mailbox", "Published"]


@dataclass(frozen=True, slots=True)
class Finished:
    """Training or evaluation ended, with a result or an error."""

    result: Any = None
    error: BaseException | None = None


@dataclass(frozen=True, slots=True)
class Published:
    """The outcome of a publish; ``error`` is None if the broker confirmed it."""

    error: BaseException | None


Item = Incoming | Finished | Published


class Mailbox:
    """A queue that keeps of the parameters only the newest.

    A worker that trains for an hour must not find an hour's versions in its memory. What it has asked for is no news:
    a download that ended is kept beside a newer offer.
    """

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._newest: Delivery | None = None
        self._ready = threading.Condition()

    def put(self, item: Item) -> None:
        """Add ``item``, from any thread. Never waits for the reader."""
        with self._ready:
            if isinstance(item, Delivery) and item.source is Source.PARAMETERS and not _was_asked_for(item):
                if self._newest is None or order_of(item.headers) >= order_of(self._newest.headers):
                    self._newest = item
            else:
                self._items.append(item)
            self._ready.notify()

    def take(self, timeout: float) -> Item | None:
        """The next item, parameters after everything else; None after ``timeout`` seconds without one."""
        with self._ready:
            self._ready.wait_for(lambda: self._items or self._newest is not None, timeout)
            if self._items:
                return self._items.popleft()
            newest, self._newest = self._newest, None
            return newest


def _was_asked_for(delivery: Delivery) -> bool:
    return delivery.chunks is not None or bool(delivery.lost)


class Bench:
    """One thread that does one piece of work at a time, so that the loop stays free to hear SIGTERM.

    It is a daemon: a training of the user's own that never asks whether to stop cannot keep the process.
    """

    def __init__(self, done: Callable[[Finished], None]) -> None:
        self._done = done
        self._work: queue.SimpleQueue[Callable[[], Any] | None] = queue.SimpleQueue()
        self._abandon = threading.Event()
        self._thread = threading.Thread(target=self._run, name="fedmq-training", daemon=True)
        self._thread.start()

    def start(self, work: Callable[[threading.Event], Any]) -> None:
        """Do ``work``; it is given an event that is set when it should give up."""
        self._abandon = abandon = threading.Event()
        self._work.put(lambda: work(abandon))

    def abandon(self) -> None:
        """Ask the work in hand to give up."""
        self._abandon.set()

    def close(self) -> None:
        """Ask the work in hand to give up, and end the thread after it; waits a second for that."""
        self._abandon.set()
        self._work.put(None)
        self._thread.join(timeout=1.0)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            try:
                finished = Finished(result=work())
            except BaseException as error:  # noqa: BLE001 - handed to the loop, which raises it
                finished = Finished(error=error)
            self._done(finished)
            del work, finished  # they hold the version and the update, while this thread waits for more work
