"""The shell around the round machine: deliveries become events, effects become deeds.

One thread handles events; checkpoints are written by a second; the transport has its own. They meet in one
queue, the inbox, so that the machine sees one event after the other.
"""

from __future__ import annotations

import json
import logging
import math
import queue
import re
import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from aggregator.checkpoint import CheckpointStore, write_tensors
from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.machine import RoundMachine, Rules
from aggregator.core.snapshot import Snapshot, VersionRecord
from aggregator.history import History
from broker.errors import BrokerError, CheckpointCorrupt, CheckpointNotWritten, FedmqError, UnknownFormat, WireError
from broker.messages import (
    NAME_PATTERN,
    Event,
    EventKind,
    Goodbye,
    Hello,
    Manifest,
    Parameters,
    Reason,
    Role,
    Scalar,
    Update,
    UpdateId,
    evaluation_metrics,
)
from broker.transport import AggregatorTransport, Connected, Delivery, Disconnected, Failed, Incoming, Outgoing, Source
from broker.wire import decode, encode

__all__ = ["AggregatorService", "Outcome"]

log = logging.getLogger("fedmq.aggregator")

#: Longest wait for an event; what health checks rely on.
IDLE_SECONDS = 1.0
#: Workers that a version's line in the log names.
SHOWN_NAMES = 8
#: How long a leaving aggregator goes on settling what has been delivered already.
DRAIN_SECONDS = 0.3


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an aggregator's work ended."""

    reason: str
    version: int
    epoch: int
    applied: int
    rejected: Mapping[str, int]
    confirmed: int
    metrics: Mapping[str, float]
    """The newest evaluation's."""


class AggregatorService:
    """Runs one run's aggregator until it is done or stopped."""

    def __init__(self, *, folder: Path, run: str, rules: Rules, store: CheckpointStore, snapshot: Snapshot) -> None:
        """``snapshot`` is what ``store.claim`` gave."""
        self.folder = folder
        self.run_name = run
        self._store = store
        self._wall = time.time() - time.monotonic()
        self._machine = RoundMachine(rules, snapshot, self._now())
        self._epoch = snapshot.epoch
        self._started = snapshot.started
        self._begun_at = (snapshot.version, snapshot.done)
        self._history = History(folder / "history.jsonl")
        self._history.open(snapshot.records, epoch=snapshot.epoch, version=snapshot.version, now=self._now())
        self._inbox: queue.SimpleQueue[Incoming | on.Happening] = queue.SimpleQueue()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._broadcasts: set[Future[None]] = set()
        self._wake_at: float | None = None
        self._touched = 0.0
        self._finish: str | None = None
        self._metrics: tuple[int, Mapping[str, float]] = (-1, {})
        self._delivery: Delivery | None = None

    def stop(self) -> None:
        """Ask the service to commit what is folded and to leave. May be called from any thread, or a signal."""
        self._inbox.put(on.StopRequested())

    def run(self, transport: AggregatorTransport) -> Outcome:
        """Work until the run is done or :meth:`stop` was called.

        Raises:
            FedmqError: what no waiting will cure: refused access, a newer aggregator, a strategy that fails.
        """
        self._transport = transport
        try:
            transport.open(self._inbox.put)
            self._loop(lambda: self._finish is not None)
            deadline = time.monotonic() + DRAIN_SECONDS
            self._loop(lambda: time.monotonic() > deadline and self._inbox.empty())
            wait(self._broadcasts.copy(), timeout=10.0)  # callbacks take from it on other threads
        finally:
            transport.close()
            self._writer.shutdown()
        return self._write_results()

    # ------------------------------------------------------------------------------------------ the loop

    def _loop(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            now = self._now()
            timeout = IDLE_SECONDS if self._wake_at is None else min(max(self._wake_at - now, 0.0), IDLE_SECONDS)
            try:
                item = self._inbox.get(timeout=min(timeout, DRAIN_SECONDS) if self._finish else timeout)
            except queue.Empty:
                item = on.Tick()
            self._show_life()
            event = self._event(item)
            if event is None:
                continue
            for effect in self._machine.handle(event, self._now()):
                self._perform(effect)
            self._delivery = None

    def _now(self) -> float:
        """Seconds since 1970 that never fall, even if somebody sets the clock back."""
        return self._wall + time.monotonic()

    def _show_life(self) -> None:
        """About once a second: look whether the run is still ours, and touch ``alive`` for health checks."""
        if time.monotonic() - self._touched > IDLE_SECONDS:
            self._touched = time.monotonic()
            try:
                self._store.require_epoch(self._epoch)
                (self.folder / "alive").touch()
            except (OSError, CheckpointCorrupt) as error:
                log.warning("the folder %s does not answer as it should: %s", self.folder, error)

    def _event(self, item: Incoming | on.Happening) -> on.Happening | None:
        match item:
            case Delivery():
                return self._read(item)
            case Connected(generation):
                log.info("connected to the broker; run %s at version %d", self.run_name, self._machine.version)
                return on.LinkUp(generation)
            case Disconnected(generation, error):
                log.warning("connection to the broker lost (%s); connecting again", error)
                return on.LinkLost(generation)
            case Failed(error):
                raise error
            case _:
                return item

    def _read(self, delivery: Delivery) -> on.Happening | None:
        self._delivery = delivery
        worker = str(delivery.headers.get("worker", ""))
        unreadable: tuple[Reason, str] | None = None
        try:
            message = decode(delivery.body)
        except UnknownFormat as error:
            unreadable = Reason.UNKNOWN_FORMAT, str(error)
        except WireError as error:
            unreadable = Reason.MALFORMED, str(error)
        else:
            if delivery.source is not Source.UPDATE:
                return self._from_aside(message)
            if isinstance(message, Update):
                assert delivery.token is not None  # noqa: S101  (updates are always acknowledged by hand)
                if message.base_epoch > self._epoch:
                    # A newer aggregator has spoken to this worker: the update is for it, and goes back to the queue.
                    self._store.require_epoch(self._epoch)
                return on.Arrived(delivery.token, message, len(delivery.body))
            if isinstance(message, Manifest):
                unreadable = Reason.NOT_SUPPORTED, "an update in several chunks; this release takes one message"
            else:
                unreadable = Reason.MALFORMED, f"a {type(message).__name__.lower()} in the queue of updates"
        if delivery.token is None:
            log.warning("ignored a %s message that cannot be read: %s", delivery.source, unreadable[1])
            return None
        return on.Unreadable(delivery.token, *unreadable, worker)

    # ----------------------------------------------------------------------------------------- the deeds

    def _from_aside(self, message: object) -> on.Happening | None:
        if getattr(message, "run", self.run_name) != self.run_name:
            return None
        return _from_aside(message, self._machine.version)

    def _perform(self, effect: do.Effect) -> None:
        match effect:
            case do.Ack(token):
                self._transport.ack(token)
            case do.Reject(token, reason, detail):
                assert self._delivery is not None  # noqa: S101  (a rejection answers the delivery at hand)
                self._transport.reject(token, reason, detail, self._delivery)
            case do.WriteCheckpoint(commit, snapshot):
                self._writer.submit(self._write, commit, snapshot)
            case do.Broadcast():
                self._broadcast(effect)
            case do.Tell(worker, reason, detail, update):
                self._tell(worker, reason, detail, update)
            case do.WakeAt(moment):
                self._wake_at = moment
            case do.Finish(reason):
                self._finish = reason
            case do.Record(fact):
                self._record(fact)

    def _write(self, commit: int, snapshot: Snapshot) -> None:
        try:
            self._store.write(snapshot)
        except CheckpointNotWritten as error:
            self._inbox.put(on.CheckpointFailed(commit, str(error)))
        except FedmqError as error:
            self._inbox.put(Failed(error))
        except BaseException as error:
            self._inbox.put(Failed(FedmqError(f"writing checkpoint {commit}: {error!r}")))
            raise
        else:
            self._inbox.put(on.CheckpointWritten(commit))

    def _broadcast(self, effect: do.Broadcast) -> None:
        message = Parameters(
            run=self.run_name,
            epoch=effect.epoch,
            version=effect.version,
            plan=effect.plan,
            digest=effect.digest,
            model=effect.model,
            tensors=effect.parameters,
        )
        headers: dict[str, str | int] = {
            "run": self.run_name,
            "epoch": effect.epoch,
            "version": effect.version,
            "attempt": effect.plan.attempt,
            "done": int(effect.plan.done),
        }
        outgoing = Outgoing(
            body=encode(message), headers=headers, message_id=f"{self.run_name}/{effect.epoch}/{effect.version}"
        )
        future = self._transport.broadcast(outgoing)
        self._broadcasts.add(future)
        future.add_done_callback(self._broadcast_done)

    def _broadcast_done(self, future: Future[None]) -> None:
        self._broadcasts.discard(future)
        error = future.exception()
        # What waiting cures, the transport has tried again, or the next connection brings the current version.
        cured = isinstance(error, BrokerError) and error.retryable
        if isinstance(error, FedmqError) and not cured:
            self._inbox.put(Failed(error))

    def _tell(self, worker: str, reason: Reason, detail: str, update: UpdateId | None) -> None:
        data: dict[str, Scalar] = {"reason": reason.value, "detail": detail[:500], "update": str(update or "")}
        event = Event(run=self.run_name, kind=EventKind.NOTICE, source="aggregator", time=self._now(), data=data)
        self._transport.notify(worker, Outgoing(body=encode(event), headers={"run": self.run_name}))

    def _progress(self, what: str, **data: float | str | None) -> None:
        event = Event(
            run=self.run_name,
            kind=EventKind.PROGRESS,
            source="aggregator",
            time=self._now(),
            data={"what": what, "version": self._machine.version, **data},
        )
        self._transport.event("progress", Outgoing(body=encode(event), headers={"run": self.run_name, "what": what}))

    def _record(self, fact: do.Fact) -> None:
        match fact:
            case do.Folded(entry, fill, goal, seconds):
                self._progress(
                    "folded",
                    worker=entry.id.worker,
                    staleness=entry.staleness,
                    fill=fill,
                    goal=goal,
                    seconds=seconds,
                    loss=entry.loss,
                )
            case do.VersionMade(record):
                self._history.version(record)
                staleness = [entry.staleness for entry in record.updates]
                self._progress("version", loss=record.loss, updates=len(staleness), seconds=record.seconds)
                log.info(
                    "version %d: %s, loss %s, staleness up to %d, %.2f s",
                    record.version,
                    _senders(record),
                    "unknown" if record.loss is None else f"{record.loss:.4f}",
                    max(staleness),
                    record.seconds,
                )
            case do.EvaluationRecord(worker, version, metrics):
                self._history.evaluation(fact, self._now())
                if version >= self._metrics[0]:
                    self._metrics = version, metrics
                log.info("version %d evaluated by %s: %s", version, worker, _figures(metrics))
            case do.Rejected(worker, reason, detail, update):
                self._progress("rejected", worker=worker, reason=reason.value)
                # What was on its way when the last round closed is the end of every healthy run.
                level = logging.INFO if reason is Reason.RUN_DONE else logging.WARNING
                log.log(level, "rejected %s of %s: %s: %s", update or "a message", worker or "?", reason, detail)
            case do.Came(worker, role):
                log.info("%s %s is here", role, worker)
            case do.Went(worker, role, ""):
                log.warning("%s %s has been silent for too long; not waiting for it", role, worker)
            case do.Went(worker, role, reason):
                log.info("%s %s has left: %s", role, worker, reason)
            case do.Repeated(update_id):
                log.debug("update %s came again; it counts once", update_id)
            case do.Warn(text):
                log.warning("%s", text)

    # ---------------------------------------------------------------------------------------- the results

    def _write_results(self) -> Outcome:
        machine = self._machine
        outcome = Outcome(
            reason=self._finish or "",
            version=machine.version,
            epoch=self._epoch,
            applied=machine.applied,
            rejected=dict(machine.rejected),
            confirmed=sum(sum(counts.values()) for counts in machine.roster.confirmed().values()),
            metrics=self._metrics[1],
        )
        log.info("run %s %s at version %d; results in %s", self.run_name, outcome.reason, outcome.version, self.folder)
        is_written = all((self.folder / name).exists() for name in ("summary.json", "model.safetensors"))
        if self._begun_at == (outcome.version, True) and is_written:
            return outcome  # the run had been done before: what was written then still stands
        summary = {
            "run": self.run_name,
            "outcome": outcome.reason,
            "rounds": outcome.version,
            "epoch": outcome.epoch,
            "seconds": round(self._now() - self._started, 3),
            "updates": {
                "confirmed": outcome.confirmed,
                "applied": outcome.applied,
                "rejected": sum(outcome.rejected.values()),
                "rejected_by_reason": dict(outcome.rejected),
            },
            "evaluated_version": self._metrics[0] if self._metrics[0] >= 0 else None,
            "evaluation": {name: value if math.isfinite(value) else None for name, value in outcome.metrics.items()},
        }
        try:
            text = (json.dumps(summary, indent=2) + "\n").encode()
            _replace(self.folder / "summary.json", lambda file: file.write(text))
            metadata = {"format": "pt", "run": self.run_name}
            _replace(self.folder / "model.safetensors", lambda file: write_tensors(file, machine.parameters, metadata))
        except OSError as error:
            raise CheckpointNotWritten(
                f"{self.folder}: {error.strerror}; the run itself is safe in its checkpoint: make room, start again"
            ) from None
        return outcome


def _from_aside(message: object, newest: int) -> on.Happening | None:
    """An event from a message that needs no acknowledgement; None for what makes no sense."""
    match message:
        case Hello():
            return on.Joined(message)
        case Goodbye():
            return on.Left(message)
        case Event(kind=EventKind.HEARTBEAT, source=source, data=data):
            role = Role.EVALUATOR if data.get("role") == Role.EVALUATOR else Role.TRAINER
            confirmed = data.get("confirmed")
            count = confirmed if isinstance(confirmed, int) and not isinstance(confirmed, bool) else 0
            incarnation = str(data.get("incarnation", ""))
            is_name = re.fullmatch(NAME_PATTERN, incarnation) is not None
            return on.Seen(source, incarnation, role, min(max(count, 0), 2**53)) if is_name else None
        case Event(kind=EventKind.EVALUATION, source=source, data=data):
            version = data.get("version")
            if isinstance(version, int) and not isinstance(version, bool) and 0 <= version <= newest:
                return on.Evaluated(source, version, evaluation_metrics(message))
    return None


def _senders(record: VersionRecord) -> str:
    """``4 updates of a, b (2), c``."""
    counts = Counter(entry.id.worker for entry in record.updates)
    names = [f"{name} ({n})" if n > 1 else name for name, n in sorted(counts.items())]
    shown = ", ".join(names[:SHOWN_NAMES]) + (f" and {len(names) - SHOWN_NAMES} more" if names[SHOWN_NAMES:] else "")
    return f"{len(record.updates)} updates of {shown}"


def _figures(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())


def _replace(target: Path, write: Callable[[BinaryIO], object]) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    with temporary.open("xb") as file:
        write(file)
    temporary.replace(target)
