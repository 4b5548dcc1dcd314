"""The view of a run: events and what the broker says go in, a snapshot, curves and a log come out.

No I/O, no clock, no threads: the time of arrival comes in with each event, and never falls. Whatever comes, and however
long the run goes on, memory stays bounded; whatever is in it is harmless to show (``fedmq.monitoring.text``).

Times are seconds since 1970 by the watcher's clock, but for the end of a quarantine, which is by the aggregator's.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from typing import Any

from broker.messages import Event, EventKind, Reason, evaluation_metrics
from fedmq.monitoring.curve import Curve
from fedmq.monitoring.facts import BrokerFacts
from fedmq.monitoring.leading import DISK, Leaders, Status, figures_of, parsed
from fedmq.monitoring.log import Entry, EventLog, Level
from fedmq.monitoring.text import clean, count, number, real, whole
from fedmq.monitoring.worker import MOST_REASONS, Pace, Worker

__all__ = ["SILENT_SECONDS", "View"]

#: An aggregator that was not heard for so long is silent: it tells its status about every second, but a slow disk may
#: keep it for some.
SILENT_SECONDS = 15.0

#: Beyond, who was not heard for longest is forgotten.
MOST_WORKERS = 2000
#: Letters of a text that says what is wrong.
LONGEST = 500
#: Values of staleness that are looked at, and seconds over which rates are told.
RECENT = 500
RATE_SECONDS = 60.0


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
        self.has_left = False
        """Whether the active aggregator has said goodbye."""
        self.workers: dict[str, Worker] = {}
        self.rejected: Counter[str] = Counter()
        """Since the watch began."""
        self.facts = BrokerFacts()
        self.missing: dict[str, str] = {}
        """By source: what cannot be known, and why."""
        self._leaders = Leaders()
        self._alarms: tuple[str, ...] = ()
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
                self._heard, self.has_left = now, False
                self._progress(event.data, now)
            case EventKind.STATUS:
                self._told(event.data, now)
            case _:
                pass

    def observe(self, facts: BrokerFacts, now: float) -> None:
        """Take in what the broker says now."""
        self.facts = facts
        if facts.alarms is None:
            return
        before, self._alarms = self._alarms, facts.alarms
        for alarm in facts.alarms:
            if alarm not in before:
                self._log.add(now, "error", "broker", alarm)
        if before and not facts.alarms:
            self._log.add(now, "info", "broker", "the alarm is over")

    def tick(self, now: float) -> None:
        """Let time alone change what it changes: call it about once a second."""
        for worker in self.workers.values():
            is_silent = worker.silence(now) > 0
            if is_silent and worker.name not in self._silent:
                self._silent.add(worker.name)
                self._log.add(now, "warning", "worker", f"{worker.name} is silent")
        self._leaders.forget(now)

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
            "aggregators": self._leaders.snapshot(self.facts.aggregators or (), now),
            "buffer": {"fill": self.fill, "goal": self.goal},
            "rates": self._rates(now),
            "staleness": dict(status.staleness) if status.staleness else _spread(self._staleness),
            "updates": status.applied,
            "loss": self.loss,
            "evaluation": {
                "version": self.evaluated if self.evaluated >= 0 else None,
                "metrics": {name: real(value) for name, value in sorted(self.metrics.items())},
            },
            "workers": [self.workers[name].snapshot(pace, now) for name in sorted(self.workers)],
            "rejected": dict(self.rejected if status.rejected is None else status.rejected),
            "dead_letters": self.facts.dead_letters,
            "queues": [queue.snapshot() for queue in self.facts.queues],
            "alarms": None if self.facts.alarms is None else [clean(text, LONGEST) for text in self.facts.alarms],
            "disk": {name: status.disk.get(name) for name in DISK},
            "missing": [clean(text, LONGEST) for text in self._missing(now)],
        }

    def state(self, now: float) -> str:
        """``waiting``, ``running``, ``paused``, ``done`` or ``silent``."""
        if self._heard is None:
            return "done" if self.facts.is_done else "waiting"
        known = self._status.state if self._status is not None else ""
        if known == "done":
            return known
        if self.has_left or now - self._heard > SILENT_SECONDS:
            return "silent"
        return known or "running"

    @property
    def is_unheard(self) -> bool:
        """Whether neither an aggregator nor a worker has been heard."""
        return self._heard is None and all(worker.heard is None for worker in self.workers.values())

    @property
    def is_complete(self) -> bool:
        """Whether everything that the active aggregator tells has come since the watch began."""
        return self._status is not None and self._status.is_complete

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

    def _told(self, data: Mapping[str, Any], now: float) -> None:
        """An aggregator's own word."""
        name, epoch = clean(data.get("aggregator")), whole(data.get("epoch"), 0)
        if (gone := self._leaders.hear(data, now)) is not None:
            self._log.add(now, "info", "aggregator", f"aggregator {gone} has left")
        if not data.get("active") or epoch < self.epoch:
            return  # one that was replaced, and has not noticed, knows nothing of what is now
        if epoch > self.epoch:
            self._log.add(now, "info", "aggregator", f"aggregator {name} leads, epoch {epoch}")
        self._heard, self.epoch, self.has_left = now, epoch, bool(data.get("leaves"))
        # Not the larger of both: a run may be taken back, and goes on from there under a new epoch.
        version = count(data.get("version"))
        self.version = self.version if version is None else version
        self.fill, self.goal = whole(data.get("fill"), 0), whole(data.get("goal"), 0) or self.goal
        self.rounds = count(data.get("rounds"))
        if (loss := real(data.get("loss"))) is not None:
            self.loss = loss
        evaluated = whole(data.get("evaluated"), -1)
        if evaluated > self.evaluated:
            self.evaluated, self.metrics = evaluated, figures_of(data.get("metrics"))
        self._status = Status.read(data, self._status)
        for key, text in data.items():
            row = parsed(text) if key.startswith("row") else None
            if isinstance(row, Mapping) and "name" in row:
                self._worker(row["name"]).told(row, now)

    # --------------------------------------------------------------------------------------- the snapshot

    def _newest(self) -> tuple[int, int]:
        return self.facts.newest or (0, 0)

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
        silence = 0.0 if self._heard is None else now - self._heard
        if state == "waiting" and self.facts.is_declared is False:
            found.append(f"no aggregator has ever declared run {self.run} on this broker")
        elif self._heard is None and state == "done":
            found.append("no aggregator is heard, as the run is done: its workers and figures are in its folder")
        elif state == "waiting":
            found.append("no aggregator has been heard: workers, rates, staleness and the buffer are not known")
        elif self.has_left and state == "silent":
            found.append("the aggregator has left, and no other leads: its figures are the last ones")
        elif state == "silent":
            found.append(f"the aggregator has not been heard for {silence:.0f} s: its figures are old")
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
