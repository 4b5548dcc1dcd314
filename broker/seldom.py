"""Warnings that would come again and again, said once in a while."""

from __future__ import annotations

import threading
import time

__all__ = ["SECONDS", "Seldom"]

#: How often one thing is said.
SECONDS = 30.0


class Seldom:
    """Says whether it is time to say something. May be asked from any thread."""

    def __init__(self, seconds: float = SECONDS) -> None:
        """The same thing is said at most every ``seconds``."""
        self._seconds = seconds
        self._said: dict[str, float] = {}
        self._lock = threading.Lock()

    def may(self, what: str) -> bool:
        """Whether to say ``what``, a thing's name. The first time yes, and then no for a while."""
        now = time.monotonic()
        with self._lock:
            last = self._said.get(what)
            if last is not None and now - last < self._seconds:
                return False
            self._said[what] = now
            return True
