"""One worker, as those who watch the run know it, and what there is to remark about it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from broker.messages import Reason, Role
from fedmq.monitoring.text import clean, count, real, whole

__all__ = ["SILENT_SECONDS", "Pace", "Worker"]

#: A worker that was not heard for so long, or for three of its heartbeats, is silent.
SILENT_SECONDS = 10.0
MISSED_BEATS = 3

#: So many times as slow as the median is slow; not below so many seconds for an update, where all is noise.
SLOW_TIMES = 2.0
SLOW_SECONDS = 0.1

#: A score that is worth a remark: one bad update.
REMARKABLE_SCORE = 1.0

#: Below it a worker pulls the other way; honest ones are about at a right angle when little is left to learn.
REMARKABLE_COSINE = -0.1

#: Reasons that one worker may have; there are about twenty.
MOST_REASONS = 64


@dataclass(frozen=True, slots=True)
class Pace:
    """What is usual among the workers that train."""

    seconds: float | None = None
    """Median of the seconds for one update."""
    step: float | None = None
    """Median of the seconds for one local step."""

    @classmethod
    def of(cls, workers: Iterable[Worker]) -> Pace:
        """The lower of two middle ones, so that of two workers the slow one can be told."""
        trainers = [worker for worker in workers if worker.role == Role.TRAINER]
        seconds = [seconds for worker in trainers if (seconds := worker.usual or worker.seconds)]
        steps = [worker.step_seconds for worker in trainers if worker.step_seconds]
        return cls(statistics.median_low(seconds) if seconds else None, statistics.median_low(steps) if steps else None)


@dataclass(slots=True)
class Worker:
    """What is known of one worker."""

    name: str
    state: str = ""
    """As it said last, or as whoever expects it says."""
    role: str = Role.TRAINER.value
    version: int = -1
    confirmed: int | None = None
    """Updates of its present life that the broker has confirmed, as it says."""
    applied: int | None = None
    """Its updates in the model, as the aggregator says."""
    loss: float | None = None
    seconds: float | None = None
    """For one update."""
    usual: float | None = None
    """Mean seconds for one update, as the aggregator says."""
    step_seconds: float | None = None
    """For one local step."""
    cosine: float | None = None
    rejected: dict[str, int] = field(default_factory=dict)
    score: float = 0.0
    until: float | None = None
    """End of its quarantine."""
    farewell: str = ""
    present: bool | None = None
    """Whether the aggregator counts it in; None if that is not known."""
    heard: float | None = None
    """When it was last heard, by the watcher's clock; None if never."""
    beat: float | None = None
    """When its last heartbeat came."""
    interval: float = 0.0
    """Seconds between its last two heartbeats."""
    mean_staleness: float | None = None
    """As the aggregator says."""
    recent: deque[int] = field(default_factory=lambda: deque(maxlen=50))
    """Staleness of its last updates, as the events say."""

    @property
    def staleness(self) -> float | None:
        """Mean of its last updates."""
        if self.mean_staleness is not None:
            return self.mean_staleness
        return sum(self.recent) / len(self.recent) if self.recent else None

    def said(self, data: Mapping[str, Any], now: float) -> None:
        """A heartbeat."""
        if self.beat is not None:
            self.interval = max(0.0, now - self.beat)
        self.heard = self.beat = now
        self.state = clean(data.get("state", ""), 40)
        self.role = clean(data.get("role", self.role), 20)
        self.farewell = ""
        self.version = whole(data.get("version"), self.version)
        confirmed = count(data.get("confirmed"))
        self.confirmed = self.confirmed if confirmed is None else confirmed
        # None before the first training, and where a loss is no number any more; not the one before, then.
        self.loss = real(data.get("loss"))
        self.seconds = real(data.get("seconds")) or None

    def told(self, row: Mapping[str, Any], now: float) -> None:
        """What the aggregator's status says of it; a key that is not there says that nothing is known."""
        seen = real(row.get("seen"))
        if seen is not None:
            self.heard = max(now - max(seen, 0.0), self.heard or -math.inf)
        self.role = clean(row.get("role", self.role), 20)
        self.present = bool(row.get("present"))
        self.farewell = clean(row.get("left", ""))
        self.applied = count(row.get("updates"))
        self.mean_staleness = real(row.get("staleness"))
        self.step_seconds = real(row.get("pace"))
        self.cosine = real(row.get("cosine"))
        self.score = real(row.get("score")) or 0.0
        self.until = real(row.get("until"))
        rejected = row.get("rejected")
        pairs = list(rejected.items())[:MOST_REASONS] if isinstance(rejected, Mapping) else []
        self.rejected = {clean(reason): n for reason, times in pairs if (n := count(times))}
        self.usual = real(row.get("seconds")) or None
        if self.beat is None:  # else its own word is newer
            self.state = clean(row.get("state", ""), 40)
            self.version = whole(row.get("version"), self.version)
            self.loss, self.seconds = real(row.get("loss")), real(row.get("last")) or self.usual

    def silence(self, now: float) -> float:
        """Seconds for which it has been silent, if that is too long; else 0."""
        if self.heard is None or self.farewell:
            return 0.0
        passed = now - self.heard
        return passed if passed > max(SILENT_SECONDS, MISSED_BEATS * self.interval) else 0.0

    def shown_state(self, now: float) -> str:
        """In one word, or a few."""
        if self.farewell:
            return "left"
        if self.silence(now):
            return "silent"
        if self.until is not None:
            return "quarantine"
        return self.state or ("here" if self.present else "away" if self.present is False else "")

    def remarks(self, pace: Pace, now: float) -> list[str]:
        """What an operator should know, the most important first."""
        found = []
        if silence := self.silence(now):
            found.append(f"silent for {_duration(silence)}")
        if self.until is not None:
            found.append(f"in quarantine until {_moment(self.until)}")
        # What was on its way when the run ended is no fault.
        bad = {reason: n for reason, n in self.rejected.items() if reason != Reason.RUN_DONE}
        if bad:
            reasons = sorted(bad.items(), key=lambda pair: (-pair[1], pair[0]))
            named = ", ".join(reason if len(bad) == 1 else f"{n} {reason}" for reason, n in reasons[:4])
            found.append(f"{sum(bad.values())} rejected: {named}" + (", …" if reasons[4:] else ""))
        if self.cosine is not None and self.cosine < REMARKABLE_COSINE:
            found.append(f"against the others: cosine {self.cosine:.2f}")
        if self.score >= REMARKABLE_SCORE:
            found.append(f"score {self.score:.1f}")
        if not silence:  # what it was like before is of no use now
            found += self._slowness(pace)
        if self.farewell:
            found.append("left" if self.farewell == "left" else f"left: {self.farewell}")
        return found

    def _slowness(self, pace: Pace) -> list[str]:
        seconds = self.usual or self.seconds
        if self.role != Role.TRAINER or seconds is None or seconds < SLOW_SECONDS:
            return []
        if pace.seconds and seconds >= SLOW_TIMES * pace.seconds:
            return [f"slow: {seconds / pace.seconds:.1f} times the median's seconds an update"]
        if pace.step and self.step_seconds and self.step_seconds >= SLOW_TIMES * pace.step:
            return [f"slow: {self.step_seconds / pace.step:.1f} times the median's seconds a step"]
        return []

    def snapshot(self, pace: Pace, now: float) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "name": self.name,
            "role": self.role,
            "state": self.shown_state(now),
            "seen_seconds": None if self.heard is None else round(max(0.0, now - self.heard), 1),
            "version": self.version if self.version >= 0 else None,
            "updates": self.applied,
            "sent": self.confirmed,
            "seconds": self.seconds,
            "pace": self.step_seconds,
            "staleness": None if self.staleness is None else round(self.staleness, 2),
            "loss": self.loss,
            "rejected": dict(self.rejected),
            "score": round(self.score, 3),
            "quarantined_until": self.until,
            "cosine": self.cosine,
            "contribution": None,
            "remarks": self.remarks(pace, now),
        }


def _duration(seconds: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"


def _moment(seconds: float) -> str:
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S} UTC"
    except (ValueError, OverflowError, OSError):
        return "the end of time"
