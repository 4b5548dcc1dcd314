"""What a broker tells of a run, whichever way it was asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fedmq.monitoring.text import clean

__all__ = ["BrokerFacts", "QueueFacts"]

#: Letters of a queue's name.
LONGEST = 200


@dataclass(frozen=True, slots=True)
class QueueFacts:
    """One queue or stream of the run. None is what could not be learnt."""

    name: str
    purpose: str
    """What it is for: ``updates``, ``dead letters`` and so on."""
    ready: int | None = None
    unacked: int | None = None
    nbytes: int | None = None
    consumers: int | None = None

    def snapshot(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "name": clean(self.name, LONGEST),
            "purpose": clean(self.purpose),
            "ready": self.ready,
            "unacked": self.unacked,
            "bytes": self.nbytes,
            "consumers": self.consumers,
        }


@dataclass(frozen=True, slots=True)
class BrokerFacts:
    """What was learnt by one look."""

    queues: tuple[QueueFacts, ...] = ()
    dead_letters: int | None = None
    """Messages in the run's dead-letter queue."""
    alarms: tuple[str, ...] | None = None
    """What is wrong with the broker; None if that could not be learnt."""
    aggregators: tuple[tuple[str, bool], ...] | None = None
    """Name of each aggregator that is connected, and whether it is the active one."""
    is_declared: bool | None = None
    """Whether the run's queues are there: an aggregator made them once. None if that could not be learnt."""
    newest: tuple[int, int] | None = None
    """Epoch and version of the newest version in the stream, if that was looked for."""
    is_done: bool = False
    """Whether that version is the run's last."""
    missing: tuple[str, ...] = ()
    """What cannot be known, and why."""
