"""What happened in a run, line by line, as long as there is room."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

from fedmq.monitoring.text import clean

__all__ = ["Entry", "EventLog", "Level"]

Level = Literal["info", "warning", "error"]

#: Lines that are kept, and letters of one.
ROOM = 500
LONGEST = 300


@dataclass(frozen=True, slots=True)
class Entry:
    """One line."""

    number: int
    """Counts up from 1, and tells a reader what is new."""
    time: float
    """Seconds since 1970."""
    level: Level
    kind: str
    """``version``, ``rejected``, ``worker``, ``aggregator``, ``command``, ``quarantine`` or ``broker``."""
    text: str

    def snapshot(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {name: getattr(self, name) for name in ("number", "time", "level", "kind", "text")}


class EventLog:
    """The newest lines."""

    def __init__(self) -> None:
        """Empty."""
        self._entries: deque[Entry] = deque(maxlen=ROOM)
        self._count = 0

    def add(self, time: float, level: Level, kind: str, text: str) -> None:
        """One more line."""
        self._count += 1
        self._entries.append(Entry(self._count, time, level, kind, clean(text, LONGEST)))

    def since(self, number: int = 0) -> list[Entry]:
        """The lines after the one with this number, oldest first."""
        return [entry for entry in self._entries if entry.number > number]
