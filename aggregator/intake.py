"""The inbox: where what others send waits for the one thread that reads it, with room for so much of each account.

Updates are bounded by the broker, which hands out no more than are acknowledged. Hellos and events are not: whoever
sends them faster than they are read, as while a large version is made, would take all memory. The broker vouches for
the account, so nobody's room is taken by another.
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from broker.transport import Delivery, Source
from broker.wire.envelope import MAX_HEADER

__all__ = ["LARGEST_ASIDE", "MOST_ASIDE", "MOST_ASIDE_BYTES", "MOST_NAMED", "UNREAD", "Intake", "Unread"]

#: Hellos and events of one account that may wait, and their bytes; it sends one in seconds.
MOST_ASIDE = 2000
MOST_ASIDE_BYTES = 8 * 2**20
#: Bytes of one; what has more is no message, since a header has not, but for what surrounds it and a seal.
LARGEST_ASIDE = MAX_HEADER + 2**16
#: Accounts by whose name is counted what was left out; the others are counted as one.
MOST_NAMED = 1000

UNREAD = (
    f"hellos and events faster than they can be read, more than {MOST_ASIDE} or {MOST_ASIDE_BYTES} bytes of them, "
    f"or one of more than {LARGEST_ASIDE} bytes"
)

#: How many messages were left out, by account.
Unread = Counter[str]


Item = TypeVar("Item")


class Intake(Generic[Item]):
    """A queue without end for all but hellos and events. Things may be put in from any thread."""

    def __init__(self, speaks_for_all: Callable[[str], bool]) -> None:
        """``speaks_for_all`` says of which accounts many members share one, whose messages are not counted."""
        self._speaks_for_all = speaks_for_all
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._waiting: Counter[str] = Counter()
        self._bytes: Counter[str] = Counter()
        self._left_out: Unread = Counter()

    def put(self, item: Item) -> None:
        """Put ``item`` in, unless its account has no room left."""
        if isinstance(item, Delivery) and _is_aside(item) and not self._has_room(item):
            return
        self._queue.put(item)

    def get(self, timeout: float) -> Item:
        """The next; raises :class:`queue.Empty` if none comes in so many seconds."""
        item = self._queue.get(timeout=timeout)
        if isinstance(item, Delivery) and _is_aside(item):
            with self._lock:
                _take(self._waiting, item.user, 1)
                _take(self._bytes, item.user, len(item.body))
        return item

    def empty(self) -> bool:
        """Whether nothing waits."""
        return self._queue.empty()

    def left_out(self) -> Unread:
        """What was left out since this was last asked."""
        if not self._left_out:
            return Counter()
        with self._lock:
            left_out, self._left_out = self._left_out, Counter()
            return left_out

    def _has_room(self, item: Delivery) -> bool:
        who, size = item.user, len(item.body)
        with self._lock:
            is_bounded = not self._speaks_for_all(who)
            is_full = self._waiting[who] >= MOST_ASIDE or self._bytes[who] + size > MOST_ASIDE_BYTES
            if size > LARGEST_ASIDE or (is_bounded and is_full):
                name = who if who in self._left_out or len(self._left_out) < MOST_NAMED else ""
                self._left_out[name] += 1
                return False
            self._waiting[who] += 1
            self._bytes[who] += size
            return True


def _is_aside(item: Delivery) -> bool:
    """Whether it is neither an update nor an operator's command."""
    return item.source is not Source.UPDATE and item.token is None


def _take(counts: Counter[str], who: str, much: int) -> None:
    """Who has nothing there is forgotten."""
    counts[who] -= much
    if counts[who] <= 0:
        del counts[who]
