"""The shell around the worker's machines: performs their effects, and reports what became of them.

One loop owns all state. Training runs on a thread of its own, the transport on its threads; both put what
they have to say into the mailbox.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol, assert_never

from broker.errors import BrokerError, FedmqError, MessageTooLarge, TaskError, Unroutable, WireError
from broker.logs import describe
from broker.messages import Event, EventKind, ModelSpec, Parameters, ParametersHead, Reason, Role, UpdateId
from broker.seldom import Seldom
from broker.transport import Connected, Delivery, Disconnected, Failed, Source, Standby, WorkerTransport
from broker.variates import like
from worker_client.config import WorkerConfig
from worker_client.context import Abandoned
from worker_client.core import EvaluatorMachine, WorkerMachine
from worker_client.core import events as ev
from worker_client.guard import Identity
from worker_client.heap import trim
from worker_client.mailbox import Bench, Finished, Item, Mailbox, Published
from worker_client.meter import Meter, Standing
from worker_client.notices import DIVERGED, MEANINGS
from worker_client.outbox import Outbox
from worker_client.preparing import Preparation
from worker_client.presence import Presence
from worker_client.publishing import Publishing
from worker_client.reading import Broken, Complete, Offer, explained, head_of, read, require_account
from worker_client.sending import Sender
from worker_client.shelf import Shelf
from worker_client.training import Evaluation, Trained, Trainer
from worker_client.variates import Variates

__all__ = ["GRACE", "Session", "StopSignal", "Summary"]

log = logging.getLogger("fedmq.worker")

#: Seconds for leaving in good order once asked to. Docker kills after 10, and the transport needs some to close.
GRACE = 4.0
#: Longest sleep of the loop: a signal handler cannot wake it, so it looks at the stop signal this often.
LOOK = 0.2


class StopSignal(Protocol):
    """What of ``threading.Event`` is needed."""

    def is_set(self) -> bool:
        """Whether to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """How a worker ended."""

    reason: str
    """``done`` (the run is over), ``limit`` (max_updates), or ``stopped``."""
    confirmed: int
    """Updates that the broker confirmed to this process; of an evaluator, 0."""
    version: int
    """The newest version seen; -1 if none."""
    metrics: Mapping[str, float]
    """Of the last training or evaluation."""


class Session:
    """One life of a worker, from the first connection to the goodbye."""

    def __init__(
        self,
        config: WorkerConfig,
        run: str,
        *,
        transport: WorkerTransport,
        trainer: Trainer,
        outbox: Outbox,
        identity: Identity,
        machine: WorkerMachine | EvaluatorMachine,
        role: Role,
        chunk_bytes: int,
        pack_chunks: bool,
        stop: StopSignal | None,
        grace: float,
        meter: Meter | None = None,
    ) -> None:
        self._config = config
        self._run = run
        self._transport = transport
        self._trainer = trainer
        self._machine = machine
        self._role = role
        self._meter = meter or Meter()
        self._guard = identity.guard
        more = self._meter.headers
        who = f"{config.name} {outbox.incarnation}"
        signer = identity.signer
        sender = Sender(run, config.name, outbox.incarnation, role, pack_chunks=pack_chunks, more=more, signer=signer)
        self._presence = Presence(transport, sender, outbox, config.folder)
        self._variates = Variates(config.folder if role is Role.TRAINER else None, config, trainer.spec)
        self._prepare = Preparation(config, who, trainer, self._variates)
        self._stop = stop or threading.Event()
        self._grace = grace
        self._mailbox = Mailbox()
        self._seldom = Seldom()
        self._bench = Bench(self._mailbox.put)
        self._publishing = Publishing(
            transport,
            outbox,
            sender,
            trainer.spec,
            chunk_bytes=chunk_bytes,
            variates=self._variates,
            report=self._mailbox.put,
        )
        if self._variates.pending is not None and isinstance(machine, WorkerMachine):
            self._publishing.resume(self._variates.pending)
            machine.resume()
        self._is_large = trainer.spec.nbytes > chunk_bytes
        self._shelf = Shelf()
        self._base: ParametersHead | None = None
        self._trained: tuple[ParametersHead, Trained] | None = None
        self._alarms: dict[type[ev.BackOffOver | ev.RestOver | ev.GraceOver | ev.DownloadDue], float] = {}
        self._connected = False
        self._stopping = False
        self._paused = False
        self._reason: str | None = None
        self._error: BaseException | None = None
        self._metrics: Mapping[str, float] = {}
        self._seconds = 0.0

    def run(self) -> Summary:
        """Live it. Raises what ended it, if that was an error."""
        self._meter.watch(self._standing, self._trainer.spec.nbytes)
        self._transport.open(self._mailbox.put, believe=self._guard.believes)
        heartbeat = 0.0
        try:
            while self._reason is None:
                if time.monotonic() >= heartbeat and self._connected:
                    heartbeat = time.monotonic() + self._config.heartbeat_seconds
                    self._presence.greet_again(self._machine.versions.number)
                    self._beat()
                self._turn(min(LOOK, self._config.heartbeat_seconds))
        finally:
            self._bench.close()
            self._transport.close()
        if self._error is not None:
            raise self._error
        log.info("%s %s leaves: %s", self._role, self._config.name, self._reason)
        return Summary(
            reason=self._reason,
            confirmed=self._machine.confirmed,
            version=self._version,
            metrics=dict(self._metrics),
        )

    # --------------------------------------------------------------------------------------------- events in

    def _turn(self, patience: float) -> None:
        """Look at the stop signal and the alarms, and take in one item from the mailbox."""
        if self._stop.is_set() and not self._stopping:
            self._stopping = True
            self._alarms[ev.GraceOver] = time.monotonic() + self._grace
            self._tell(ev.StopRequested())
        for event, due in list(self._alarms.items()):
            if time.monotonic() >= due:
                del self._alarms[event]
                self._tell(event())
        if self._reason is not None:
            return
        now = time.monotonic()
        item = self._mailbox.take(max(0.0, min([patience, *(due - now for due in self._alarms.values())])))
        if item is not None:
            self._receive(item)
            if self._is_large and isinstance(item, Finished | Published):
                trim()  # gradients, or a version and an update that are done with

    def _receive(self, item: Item) -> None:
        self._meter.receives(item)
        match item:
            case Delivery():
                self._read(item)
            case Connected():
                self._connected = True
                self._tell(ev.Connected())
            case Disconnected(_, error):
                self._connected = False
                log.debug("the connection broke (%s); it is being made again", error)
            case Failed(error):
                self._connected = False
                self._fail(explained(error, self._transport.account, self._config.name))
            case Finished(result, error):
                self._finished(result, error)
            case Published(error):
                self._published(error)
            case Standby():
                raise RuntimeError("only aggregators stand by")
            case _:
                assert_never(item)

    def _read(self, delivery: Delivery) -> None:
        try:
            message = read(delivery, self._run, self._shelf.shared, signed=self._guard.asks)
        except WireError as error:
            log.warning("a message from %s is ignored: %s", delivery.source, error)
            return
        if delivery.source is Source.PARAMETERS:
            require_account(self._transport.account, self._config.name, delivery.user)
        match message:
            case Complete(parameters, state):
                self._arrived(parameters, state)
            case Offer():
                self._offered(message)
            case Broken(head, problem):
                self._shelf.refuse_delta()
                if self._seldom.may("a broken download"):
                    log.warning("version %d cannot be downloaded and is asked for again: %s", head.version, problem)
                self._tell(ev.DownloadFailed(head))
            case Event(data=data):
                self._noticed(data)
            case _:
                log.warning("a message from %s is not for this worker and ignored", delivery.source)

    def _arrived(self, parameters: Parameters, state: str) -> None:
        if self._is_ours(parameters.model):
            head, versions = head_of(parameters), self._machine.versions
            self._guard.note(head)
            effects = self._machine.handle(ev.ParametersArrived(head))
            if versions.here is not None and versions.here.digest == head.digest:
                self._shelf.put(parameters, state)
            self._take_note(head, effects)

    def _offered(self, offer: Offer) -> None:
        if self._is_ours(offer.model):
            self._guard.note(offer.head)
            effects = self._machine.handle(ev.Offered(offer.head))
            if self._machine.versions.newest == offer.head:
                self._shelf.offer(offer)
            self._take_note(offer.head, effects)

    def _take_note(self, head: ParametersHead, effects: list[ev.Effect]) -> None:
        if self._machine.versions.newest is head:
            self._tell_pause(is_paused=head.plan.paused)
        self._perform(effects)

    def _is_ours(self, model: ModelSpec) -> bool:
        try:
            model.require_same(like(self._trainer.spec, model), theirs=f"this worker's task {self._trainer.task_name}")
        except FedmqError as error:
            self._fail(error)
            return False
        return True

    def _tell_pause(self, *, is_paused: bool) -> None:
        if is_paused is not self._paused and self._role is Role.TRAINER:
            log.info("the run is paused; waiting" if is_paused else "the run goes on")
        self._paused = is_paused

    def _noticed(self, data: Mapping[str, Any]) -> None:
        reason, update, detail = data.get("reason"), data.get("update"), data.get("detail")
        try:
            known = Reason(str(reason))
        except ValueError:
            log.warning("update %s was rejected: %s (%s)", update, reason, detail)
            return
        self._meter.rejected(known)
        level = logging.INFO if known is Reason.RUN_DONE else logging.WARNING
        what = f"update {update} was rejected" if update else "what this worker sends is rejected"
        log.log(level, "%s: %s (%s): %s", what, known, detail, MEANINGS[known])
        parts = str(update).split("/")
        if len(parts) == 3 and parts[2].isdecimal():
            told = UpdateId(parts[0], parts[1], int(parts[2]))
            self._variates.reject(told)
            self._tell(ev.NoticeArrived(known, told))

    def _finished(self, result: Trained | Evaluation | None, error: BaseException | None) -> None:
        if isinstance(error, Abandoned):
            self._tell(ev.Abandoned())
        elif error is not None:
            self._fail(error)
        elif result is not None:
            if isinstance(result, Trained) or self._role is Role.EVALUATOR:
                self._metrics, self._seconds = result.metrics, result.seconds
            if isinstance(result, Trained) and self._base is not None:
                self._trained = self._base, result
                self._tell(ev.TrainingDone())
            elif isinstance(result, Evaluation):
                self._tell_evaluation(result)
                self._tell(ev.EvaluationDone())

    def _published(self, error: BaseException | None) -> None:
        update = self._publishing.id
        if update is None:
            return
        if error is None:
            self._publishing.confirm()
            log.info("update %s confirmed", update)
            self._tell(ev.PublishConfirmed())
        elif isinstance(error, MessageTooLarge) and self._publishing.cut_again():
            log.warning("update %s is cut into smaller chunks: %s", update, error)
            self._publishing.send()
        elif isinstance(error, BrokerError) and error.retryable:
            if self._seldom.may(type(error).__name__):
                log.warning("update %s is published again: %s: %s", update, type(error).__name__, error)
            lacks_outbox = isinstance(error, Unroutable) and self._publishing.is_in_chunks
            self._tell(ev.PublishFailed(lacks_outbox))
        else:
            self._fail(error)

    # ------------------------------------------------------------------------------------------- effects out

    def _tell(self, event: ev.Event) -> None:
        self._perform(self._machine.handle(event))

    def _fail(self, error: BaseException) -> None:
        self._error = self._error or error
        self._tell(ev.Failed(f"{type(error).__name__}: {error}"))

    def _perform(self, effects: list[ev.Effect]) -> None:
        for effect in effects:
            try:
                self._do(effect)
            except FedmqError as error:
                # The effects after it still count: if the machine gave up already, the last of them is Exit.
                self._fail(error)

    def _do(self, effect: ev.Effect) -> None:  # noqa: PLR0912 - one branch a kind of effect
        self._meter.does(effect)
        match effect:
            case ev.SayHello(version):
                self._presence.greet(version)
            case ev.Download(head):
                self._download(head)
            case ev.DownloadLater(seconds):
                self._alarms[ev.DownloadDue] = time.monotonic() + seconds
            case ev.Train(head, ordinal):
                self._train(head, ordinal)
            case ev.Evaluate(head):
                self._evaluate(head)
            case ev.Abandon():
                self._bench.abandon()
            case ev.Publish():
                self._publish()
            case ev.PublishAgain():
                self._publishing.send()
            case ev.BackOff(seconds):
                self._alarms[ev.BackOffOver] = time.monotonic() + seconds
            case ev.Rest(seconds):
                log.info("the next training waits for %.1f s, because updates were rejected", seconds)
                self._alarms[ev.RestOver] = time.monotonic() + seconds
            case ev.SayGoodbye(reason):
                self._say_goodbye(reason)
            case ev.Exit(reason):
                self._reason = reason
                if reason == "diverged":
                    self._error = TaskError(DIVERGED)
                if reason == "failed" and self._error is None:
                    self._error = BrokerError("the aggregator rejects what this worker publishes; see the warnings")
            case _:
                assert_never(effect)

    def _download(self, head: ParametersHead) -> None:
        delivery, part = self._shelf.order()
        log.info("downloading version %d, %d chunks", head.version, len(part))
        self._transport.fetch(delivery, part)

    def _train(self, head: ParametersHead, ordinal: int) -> None:
        base, self._base = self._shelf.take(head), head
        describe(epoch=base.epoch, version=base.version)
        log.debug("training from version %d", base.version)

        def work(abandon: threading.Event) -> Trained:
            trained = self._prepare(base, ordinal, abandon.is_set)
            if abandon.wait(self._config.delay):
                raise Abandoned("the delay was cut short, because the worker leaves")
            # Whoever looks for the slow worker wants to see what it really takes.
            return replace(trained, seconds=trained.seconds + self._config.delay)

        self._bench.start(work)

    def _evaluate(self, head: ParametersHead) -> None:
        base, self._base = self._shelf.take(head), head
        describe(epoch=base.epoch, version=base.version)
        evaluate = self._trainer.evaluate if self._role is Role.EVALUATOR else self._trainer.check
        self._bench.start(lambda abandon: evaluate(base, abandon.is_set))

    def _publish(self) -> None:
        if self._trained is None:
            raise RuntimeError("there is no update to publish")
        (base, trained), self._trained = self._trained, None
        if not all(map(math.isfinite, trained.metrics.values())):
            log.warning("training diverged (%s); the aggregator will reject the update", dict(trained.metrics))
        self._publishing.start(base, trained)

    def _say_goodbye(self, reason: str) -> None:
        if not self._connected:
            return
        self._beat()  # the last figures: whoever watches a short run would see those of seconds ago
        # It goes the way that an update in hand has not got through all the time.
        self._presence.say_goodbye(reason, wait=self._publishing.id is None)

    def _tell_evaluation(self, evaluation: Evaluation) -> None:
        base = self._base
        if base is None:
            raise RuntimeError("no evaluation was asked for")
        kind = EventKind.EVALUATION if self._role is Role.EVALUATOR else EventKind.CHECK
        # A trainer's line a round is that its update is confirmed.
        level = logging.INFO if kind is EventKind.EVALUATION else logging.DEBUG
        figures = ", ".join(f"{name} {value:.4f}" for name, value in evaluation.metrics.items())
        log.log(level, "version %d: %s", base.version, figures)
        self._presence.tell(kind, evaluation, base)

    def _beat(self) -> None:
        state, loss = str(self._machine.state), self._metrics.get("loss")
        self._presence.beat(state, self._version, seconds=self._seconds, loss=loss)

    def _standing(self) -> Standing:
        machine = self._machine
        outstanding = (self._publishing.id is not None) + (self._trained is not None)
        return Standing(machine.state.value, self._version, machine.confirmed, outstanding, self._guard.refused)

    @property
    def _version(self) -> int:
        newest = self._machine.versions.newest
        return newest.version if newest else -1
