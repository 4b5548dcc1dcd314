"""The view of a run: events and what the broker says go in, a snapshot, curves and a log come out.

No I/O, no clock, no threads: the time of arrival comes in with each event, and never falls. Whatever comes, and however
long the run goes on, memory stays bounded; whatever is in it is harmless to show (``fedmq.monitoring.text``).

Times are seconds since 1970 by the watcher's clock, but for the end of a quarantine, which is by the aggregator's.
"""

from __future__ import annotations

import json
import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.messages import Event, EventKind, Reason, evaluation_metrics
from fedmq.monitoring.curve import Curve
from fedmq.monitoring.facts import BrokerFacts
from fedmq.monitoring.log import Entry, EventLog, Level
from fedmq.monitoring.text import clean, count, number, real, whole
from fedmq.monitoring.worker import MOST_REASONS, Pace, Worker

__all__ = ["SILENT_SECONDS", "View"]

#: An aggregator that was not heard for so long is silent: it tells its status about every second, but a slow disk may
#: keep it for some.
SILENT_SECONDS = 15.0
#: Then it is forgotten.
GONE_SECONDS = 300.0

#: Beyond, who was not heard for longest is forgotten.
MOST_WORKERS = 2000
MOST_AGGREGATORS = 20
#: Values of staleness that are looked at, and seconds over which rates are told.
RECENT = 500
RATE_SECONDS = 60.0


@dataclass(slots=True)
class Leader:
    """One aggregator, as it says."""

    active: bool
    epoch: int
    heard: float


@dataclass(slots=True)
class Status:
    """What the active aggregator has said of the run last, but for workers."""

    state: str = ""
    updates_per_second: float | None = None
    rounds_per_minute: float | None = None
    staleness: dict[str, float | None] = field(default_factory=dict)
    rejected: dict[str, int] | None = None
    disk: dict[str, float | None] = field(default_factory=dict)
    workers: int = 0
    pages: frozenset[int] = frozenset()
    """Which pages of workers have come since the watch began."""
    of: int = 0
    """How many there are."""


class View:
    """What the events of one run add up to."""

    def __init__(self, run: str) -> None:
        """Nothing has been heard yet."""
        self.run = clean(run)
        self.version = 0
        self.epoch = 0
        self.loss: float | None = None
        self.metrics: dict[str, float] = {}
        self.evaluated = -1
        self.fill = self.goal = 0
        self.rounds: int | None = None
        """After which the run ends, if it does."""
        self.workers: dict[str, Worker] = {}
        self.rejected: Counter[str] = Counter()
        """Since the watch began."""
        self.facts = BrokerFacts()
        self.missing: dict[str, str] = {}
        """By source: what cannot be known, and why."""
        self._leaders: dict[str, Leader] = {}
        self._status: Status | None = None
        self._heard: float | None = None
        self._staleness: deque[int] = deque(maxlen=RECENT)
        self._folded: deque[tuple[float, int]] = deque(maxlen=RECENT)
        self._made: deque[float] = deque(maxlen=RECENT)
        self._versions = Curve(("time", "version", "loss", "seconds", "updates", "staleness"))
        self._evaluations = Curve(("time", "version", "metrics"))
        self._log = EventLog()
        self._silent: set[str] = set()
        self._began: float | None = None

    # --------------------------------------------------------------------------------------- what goes in

    def expect(self, worker: str, state: str) -> None:
        """Show ``worker`` with ``state`` until it is heard."""
        line = self._worker(worker)
        if line.heard is None:
            line.state = clean(state, 40)

    def take(self, event: Event, now: float) -> None:
        """Take in an event of this run that came at ``now``."""
        self._began = now if self._began is None else self._began
        match event.kind:
            case EventKind.HEARTBEAT:
                self._greet(event.source, now)
                self._worker(event.source).said(event.data, now)
            case EventKind.EVALUATION:
                self._evaluation(event, now)
            case EventKind.PROGRESS:
                self._heard = now
                self._progress(event.data, now)
            case _:
                pass

    def observe(self, facts: BrokerFacts, now: float) -> None:
        """Take in what the broker says now."""
        before, self.facts = self.facts, facts
        for alarm in facts.alarms or ():
            if alarm not in (before.alarms or ()):
                self._log.add(now, "error", "broker", alarm)
        if before.alarms and facts.alarms == ():
            self._log.add(now, "info", "broker", "the alarm is over")

    def tick(self, now: float) -> None:
        """Let time alone change what it changes: call it about once a second."""
        for worker in self.workers.values():
            is_silent = worker.silence(now) > 0
            if is_silent and worker.name not in self._silent:
                self._silent.add(worker.name)
                self._log.add(now, "warning", "worker", f"{worker.name} is silent")
        self._leaders = {n: one for n, one in self._leaders.items() if now - one.heard < GONE_SECONDS}

    # ------------------------------------------------------------------------------------ what comes out

    def snapshot(self, now: float) -> dict[str, Any]:
        """The run as it is, as JSON can hold it; ``docs/status.schema.json`` says what stands where."""
        status = self._status or Status()
        pace = Pace.of(self.workers.values())
        return {
            "run": self.run,
            "time": now,
            "version": self.version if self._heard is not None else self._newest()[1],
            "epoch": self.epoch if self._heard is not None else self._newest()[0],
            "rounds": self.rounds,
            "state": self.state(now),
            "heard_seconds": None if self._heard is None else round(max(0.0, now - self._heard), 1),
            "aggregators": self._aggregators(now),
            "buffer": {"fill": self.fill, "goal": self.goal},
            "rates": self._rates(now),
            "staleness": status.staleness or _spread(self._staleness),
            "loss": self.loss,
            "evaluation": {
                "version": self.evaluated if self.evaluated >= 0 else None,
                "metrics": {name: real(value) for name, value in sorted(self.metrics.items())},
            },
            "workers": [self.workers[name].snapshot(pace, now) for name in sorted(self.workers)],
            "rejected": dict(self.rejected) if status.rejected is None else status.rejected,
            "dead_letters": self.facts.dead_letters,
            "queues": [queue.snapshot() for queue in self.facts.queues],
            "alarms": None if self.facts.alarms is None else list(self.facts.alarms),
            "disk": {name: status.disk.get(name) for name in ("checkpoints", "bytes", "free", "total")},
            "missing": self._missing(now),
        }

    def state(self, now: float) -> str:
        """``waiting``, ``running``, ``paused``, ``done`` or ``silent``."""
        if self._heard is None:
            return "waiting"
        known = self._status.state if self._status is not None else ""
        if known == "done":
            return known
        if now - self._heard > SILENT_SECONDS:
            return "silent"
        return known or "running"

    @property
    def is_complete(self) -> bool:
        """Whether everything that the active aggregator tells has come since the watch began."""
        return self._status is not None and self._status.of > 0 and len(self._status.pages) >= self._status.of

    def series(self) -> dict[str, dict[str, list[Any]]]:
        """The run's curves since the watch began: of the versions, and of their evaluations."""
        return {"versions": self._versions.columns(), "evaluations": self._evaluations.columns()}

    def log(self, since: int = 0) -> list[Entry]:
        """What happened after the entry with this number, oldest first."""
        return self._log.since(since)

    # -------------------------------------------------------------------------------------------- workers

    def _worker(self, name: object) -> Worker:
        shown = clean(name)
        known = self.workers.get(shown)
        if known is None:
            if len(self.workers) >= MOST_WORKERS:
                longest = min(self.workers.values(), key=lambda worker: worker.heard or -math.inf)
                del self.workers[longest.name]
                self._silent.discard(longest.name)
            known = self.workers[shown] = Worker(shown)
        return known

    def _greet(self, name: str, now: float) -> None:
        shown = clean(name)
        if shown in self._silent:
            self._silent.discard(shown)
            self._log.add(now, "info", "worker", f"{shown} is heard again")

    # ----------------------------------------------------------------------------------------- the events

    def _evaluation(self, event: Event, now: float) -> None:
        version = whole(event.data.get("version"), -1)
        if version < 0:
            return
        metrics = dict(evaluation_metrics(event))
        self._evaluations.add(now, version, {name: real(value) for name, value in sorted(metrics.items())})
        if version >= self.evaluated:
            self.evaluated, self.metrics = version, metrics

    def _progress(self, data: Mapping[str, Any], now: float) -> None:
        self.version = max(self.version, whole(data.get("version"), 0))
        match data.get("what"):
            case "folded":
                self.fill, self.goal = whole(data.get("fill"), 0), whole(data.get("goal"), 0)
                self._folded.append((now, whole(data.get("updates"), 1)))
                for worker, staleness in _pairs(data.get("staleness")):
                    self._staleness.append(staleness)
                    self._worker(worker).recent.append(staleness)
            case "version":
                self._version(data, now)
            case "rejected":
                reason, worker = clean(data.get("reason")), clean(data.get("worker") or "?")
                self.rejected[reason if reason in self.rejected or len(self.rejected) < MOST_REASONS else "…"] += 1
                level: Level = "info" if reason == Reason.RUN_DONE else "warning"
                self._log.add(now, level, "rejected", f"an update of {worker} was rejected: {reason}")
            case "quarantine":
                score = number(data.get("score")) or 0.0
                text = f"{clean(data.get('worker'))} is in quarantine: its score is {score:.2f}"
                self._log.add(now, "warning", "quarantine", text)
            case "release":
                self._log.add(now, "info", "quarantine", f"{clean(data.get('worker'))} is out of quarantine")
            case "command":
                is_accepted = bool(data.get("accepted"))
                text = ("" if is_accepted else "refused: ") + clean(data.get("text", ""), 250)
                self._log.add(now, "info" if is_accepted else "warning", "command", text)
            case _:
                pass

    def _version(self, data: Mapping[str, Any], now: float) -> None:
        self.loss = real(data.get("loss"))
        self.fill = 0
        self._made.append(now)
        mean = sum(self._staleness) / max(1, len(self._staleness))
        self._versions.add(
            now,
            self.version,
            self.loss,
            real(data.get("seconds")),
            count(data.get("updates")),
            _spread(self._staleness)["median"],
        )
        loss = "unknown" if self.loss is None else f"{self.loss:.4f}"
        figures = ", ".join(f"{name} {value:.4f}" for name, value in sorted(self.metrics.items()))
        shown = f"; version {self.evaluated} held out: {figures}" if figures else ""
        text = f"round {self.version}: training loss {loss}, staleness {mean:.1f}{shown}"
        self._log.add(now, "info", "version", text)

    # --------------------------------------------------------------------------------------- the snapshot

    def _newest(self) -> tuple[int, int]:
        return self.facts.newest or (0, 0)

    def _aggregators(self, now: float) -> list[dict[str, Any]]:
        found = {
            name: {"name": name, "active": one.active, "epoch": one.epoch if one.active else None}
            | {"seen_seconds": round(max(0.0, now - one.heard), 1)}
            for name, one in self._leaders.items()
        }
        for name, active in self.facts.aggregators or ():
            shown = clean(name)
            found.setdefault(shown, {"name": shown, "active": active, "epoch": None, "seen_seconds": None})
        return sorted(found.values(), key=lambda one: (not one["active"], one["name"]))[:MOST_AGGREGATORS]

    def _rates(self, now: float) -> dict[str, float | None]:
        status = self._status
        if status is not None and status.rounds_per_minute is not None:
            return {"updates_per_second": status.updates_per_second, "rounds_per_minute": status.rounds_per_minute}
        since = max(now - RATE_SECONDS, self._began if self._began is not None else now)
        passed = now - since
        if passed < 1.0:
            return {"updates_per_second": None, "rounds_per_minute": None}
        folded = sum(n for time, n in self._folded if time >= since)
        made = sum(1 for time in self._made if time >= since)
        return {
            "updates_per_second": round(folded / passed, 3),
            "rounds_per_minute": round(60 * made / passed, 2),
        }

    def _missing(self, now: float) -> list[str]:
        found = [text for text in self.missing.values() if text] + list(self.facts.missing)
        state = self.state(now)
        if state == "waiting":
            found.append("no aggregator has been heard: workers, rates, staleness and the buffer are not known")
        elif state == "silent":
            found.append(
                f"the aggregator has not been heard for {now - (self._heard or now):.0f} s: its figures are old"
            )
        elif self._status is None:
            found.append("the aggregator tells no status (an older version?): scores, rejections by worker, disk")
        return found


def _spread(values: deque[int]) -> dict[str, float | None]:
    """Median, 95th percentile (nearest rank) and maximum."""
    ordered = sorted(values)
    if not ordered:
        return {"median": None, "p95": None, "max": None}
    last = len(ordered) - 1
    return {
        "median": float(ordered[len(ordered) // 2]),
        "p95": float(ordered[min(last, math.ceil(0.95 * len(ordered)) - 1)]),
        "max": float(ordered[last]),
    }


def _pairs(text: object) -> Iterator[tuple[str, int]]:
    """Of ``w0:3 w1:0``, the names and numbers."""
    for part in str(text).split():
        name, _, digits = part.partition(":")
        if digits.isdecimal() and len(digits) < 16:
            yield name, int(digits)


def _parsed(text: object) -> Any:
    """What ``text`` says as JSON; None if it says nothing."""
    try:
        return json.loads(str(text))
    except (ValueError, RecursionError):
        return None
