"""The shell around the round machine: deliveries become events, effects become deeds.

One thread handles events; checkpoints are written by a second; the transport has its own. They meet in one
queue, the inbox, so that the machine sees one event after the other.
"""

from __future__ import annotations

import logging
import queue
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from aggregator.archive import UpdateArchive
from aggregator.broadcasts import Announcer, Broadcasts
from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.machine import RoundMachine
from aggregator.core.snapshot import Snapshot
from aggregator.gate import Gate, too_large
from aggregator.history import History
from aggregator.intake import Intake
from aggregator.meter import Meter
from aggregator.orders import ordered
from aggregator.reading import from_aside, read_update
from aggregator.reign import Reign, claim, shown
from aggregator.reporting import Reporter
from aggregator.results import Outcome, is_written, write_results
from aggregator.room import Room
from aggregator.senders import Senders
from aggregator.signatures import Signatures
from aggregator.status import StatusTeller
from aggregator.writing import CheckpointWriter
from broker.errors import (
    CheckpointError,
    CheckpointNotWritten,
    ConfigError,
    StaleEpoch,
    WireError,
)
from broker.messages import Command, Role
from broker.seldom import Seldom
from broker.settings import CHUNK_BYTES
from broker.transport import (
    AggregatorTransport,
    Connected,
    Delivery,
    Disconnected,
    Failed,
    Incoming,
    Source,
    Standby,
    largest_update,
)
from broker.wire import encode_parts

__all__ = ["AggregatorService", "Outcome"]

log = logging.getLogger("fedmq.aggregator")

#: Longest wait for an event; what health checks rely on.
IDLE_SECONDS = 1.0
#: Before it is tried again to own a run whose folder did not let it.
RETRY_SECONDS = 5.0
#: How long to listen, once superseded, whether the connection is lost as well.
LISTEN_SECONDS = 2.0
#: How long a leaving aggregator goes on settling what has been delivered already.
DRAIN_SECONDS = 0.3
#: Up to this size of a model, in bytes, the next update comes in while one is folded; above, what that would save is
#: less than the memory is worth.
BESIDE = 320 * 2**20


class AggregatorService:
    """Runs one run's aggregator: waits for its turn, then leads the run until it is done, stopped or superseded."""

    def __init__(
        self,
        *,
        folder: Path,
        run: str,
        config: AggregatorConfig,
        store: CheckpointStore,
        chunk_bytes: int = CHUNK_BYTES,
        pack_chunks: bool = False,
        accept_older: bool = False,
        drop_changes: bool = False,
        meter: Meter | None = None,
    ) -> None:
        """Nothing is claimed before it is this aggregator's turn.

        Args:
            folder: where results and the history are written.
            run: the run's name.
            config: the settings; what was changed on the running run goes on top of them.
            store: the run's checkpoints.
            chunk_bytes: versions that are larger travel in chunks.
            pack_chunks: pack the chunks.
            accept_older: begin with the newest checkpoint even if newer versions have been seen.
            drop_changes: forget what was changed on the running run.
            meter: counts what is done; nothing does, if it is None.
        """
        self.folder = folder
        self.run_name = run
        self.leads = False
        """Whether the broker has this aggregator for the active one, as far as it knows."""
        self.has_claimed = False
        """Whether it has owned the run."""
        self._config = config
        self._store = store
        self._meter = meter or Meter()
        self._signatures = signed = Signatures.load(config, run)
        self._versions = Broadcasts(
            run, chunk_bytes=chunk_bytes, codec=config.version_codec, lossless=pack_chunks, signer=signed.signer
        )
        self._accept_older, self._drop_changes = accept_older, drop_changes
        self._wall = time.time() - time.monotonic()
        self._senders = Senders("", frozenset(config.trusted_users))
        # Asked anew each time: its own account is known once it is connected.
        self._inbox: Intake[Incoming | on.Happening] = Intake(lambda who: self._senders.speaks_for_all(who))  # noqa: PLW0108
        self._gate = Gate(config.gate_limits(), self._now, self._inbox.left_out)
        self._seldom = Seldom()
        self._led: Reign | None = None
        self._history = History(folder / "history.jsonl")
        self._writer = CheckpointWriter(store, self._inbox.put)
        self._wake_at: float | None = None
        self._is_to_stop = False
        self._touched = 0.0
        self._finish: str | None = None
        self._delivery: Delivery | None = None
        self._arrival: on.Happening | None = None
        self._stands_by = False
        self._claim_again: tuple[float, Connected] | None = None
        self._early: list[Delivery] = []
        self._to_fetch: deque[Delivery] = deque()
        self._parked: deque[tuple[Delivery, on.Arrived]] = deque()
        self._park_until = 0.0

    def stop(self) -> None:
        """Ask the service to commit what is folded and to leave. May be called from any thread, or a signal."""
        self._is_to_stop = True
        self._inbox.put(on.StopRequested())

    def run(self, transport: AggregatorTransport) -> Outcome | None:
        """Work until the run is done or :meth:`stop` was called; None if it never was this one's turn.

        Raises:
            StaleEpoch: another aggregator, or a command, owns the run's state now.
            FedmqError: what no waiting will cure: refused access, a strategy that fails.
        """
        self._transport = transport
        self._announcer = Announcer(
            self.run_name, transport, self._versions, lambda error: self._inbox.put(Failed(error))
        )
        self._room = Room(self._announcer, self._handle, self._waits_no_longer)
        signer = self._signatures.signer
        self._status = StatusTeller(self.run_name, transport, self._store.folder, self._now, signer)
        observers = [self._meter.records, self._status.note, self._gate.note]
        self._reporter = Reporter(
            self.run_name, transport, self._history, self._now, observers=observers, signer=signer
        )
        self._meter.watch(lambda: self.leads)
        try:
            transport.open(self._inbox.put, believe=self._signatures.is_own)
            self._loop(lambda: self._finish is not None)
            deadline = time.monotonic() + DRAIN_SECONDS
            self._loop(lambda: time.monotonic() > deadline and self._inbox.empty())
            self._tell_shut(at_once=True)
            self._reporter.tell_folded(at_once=True)
            self._tell_status(leaves=True)
            self._announcer.wait(timeout=10.0)
        except StaleEpoch:
            self._listen()
            raise
        finally:
            transport.close()
            self._writer.close()
            if self._led is not None and self._led.archive is not None:
                self._led.archive.close()
        return self._write_results()

    # ------------------------------------------------------------------------------------------ the loop

    def _loop(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self._take(self._next())  # no name: an update would take memory here until the next one is there

    def _next(self) -> Incoming | on.Happening:
        now = self._now()
        timeout = IDLE_SECONDS if self._wake_at is None else min(max(self._wake_at - now, 0.0), IDLE_SECONDS)
        if (due := self._reporter.due_in()) is not None:
            self._reporter.tell_folded()
            timeout = min(timeout, due or IDLE_SECONDS)
        try:
            return self._inbox.get(timeout=min(timeout, DRAIN_SECONDS) if self._finish else timeout)
        except queue.Empty:
            return on.Tick()

    def _take(self, item: Incoming | on.Happening) -> None:
        self._show_life()
        self._tell_shut()
        if self._led is not None and self._parked:
            self._take_parked(self._led.machine)
            self._delivery = self._arrival = None
        if self._claim_again is not None and time.monotonic() > self._claim_again[0]:
            self._inbox.put(item)
            item = self._claim_again[1]
        event = self._arrival = self._event(item)
        if event is None:
            return
        if self._led is None:
            if isinstance(event, on.StopRequested):
                self._finish = "stopped"
            return
        if isinstance(event, on.Arrived) and isinstance(item, Delivery):
            self._parked.append((item, event))
            self._take_parked(self._led.machine)
        else:
            self._fetch_next(item)
            self._handle(event, self._led.machine)
        self._delivery = self._arrival = None

    def _tell_shut(self, *, at_once: bool = False) -> None:
        if self._led is not None:
            for shut in self._gate.due(at_once=at_once):
                self._handle(shut, self._led.machine)

    def _take_parked(self, machine: RoundMachine) -> None:
        """Take in the updates that are here, unless there is no room for the first; they wait for that.

        The next is not fetched while they do, so that memory stays bounded; of a large model, not before the first is
        folded.
        """
        while self._parked and time.monotonic() >= self._park_until:
            item, event = self._delivery, self._arrival = self._parked[0]
            self._room.wait(machine)
            if is_small := machine.model.nbytes <= BESIDE:
                self._fetch_next(item)
            try:
                effects = machine.handle(event, self._now())
            except CheckpointNotWritten as error:
                self._park_until = time.monotonic() + RETRY_SECONDS
                warning = do.Warn(f"no room for an update ({error}); nothing was acknowledged; trying again")
                self._reporter.record(warning, machine.version)
                return
            self._parked.popleft()
            self._perform_all(effects)
            if not is_small:
                self._fetch_next(item)

    def _handle(self, event: on.Happening, machine: RoundMachine) -> None:
        self._perform_all(machine.handle(event, self._now()))

    def _perform_all(self, effects: list[do.Effect]) -> None:
        self._wake_at = None  # the machine says it anew, if there is anything that time alone will change
        for effect in effects:
            self._perform(effect)

    def _listen(self) -> None:
        """Superseded: because the turn was lost (one that hung hears of it late), or though it was not?"""
        deadline = time.monotonic() + LISTEN_SECONDS
        while self.leads and (left := deadline - time.monotonic()) > 0:
            try:
                if isinstance(self._inbox.get(timeout=left), Disconnected | Standby | Failed):
                    self.leads = False
            except queue.Empty:
                return

    def _now(self) -> float:
        """Seconds since 1970 that never fall, even if somebody sets the clock back."""
        return self._wall + time.monotonic()

    def _show_life(self) -> None:
        """About once a second: look whether the run is still ours, and touch ``alive`` for health checks."""
        if time.monotonic() - self._touched > IDLE_SECONDS:
            self._touched = time.monotonic()
            try:
                self._require_ours()
                if not self._stands_by:  # the file is the active one's, whose health it shows
                    (self.folder / "alive").touch()
            except OSError as error:
                log.warning("the folder %s does not answer as it should: %s", self.folder, error)
            self._tell_status()

    def _tell_status(self, *, leaves: bool = False) -> None:
        if self._stands_by:
            self._status.tell_standby(leaves=leaves)
        elif self._led is not None and self.leads:
            self._led.tell_status(self._status, self._reporter.metrics, leaves=leaves)

    def _waits_no_longer(self) -> bool:
        self._show_life()
        return self._is_to_stop

    def _require_ours(self) -> None:
        """Raise :class:`StaleEpoch` if the run has a newer owner. Whatever else is wrong, the next write will tell."""
        try:
            if self._led is not None:
                self._store.require_epoch(self._led.epoch)
        except StaleEpoch:
            raise
        except CheckpointError as error:
            log.warning("the folder %s does not answer as it should: %s", self.folder, error)

    def _event(self, item: Incoming | on.Happening) -> on.Happening | None:
        match item:
            case Delivery():
                return self._read(item)
            case Connected(generation, newest):
                self.leads, self._stands_by = True, False
                self._senders = replace(self._senders, own=self._transport.account)
                return on.LinkUp(generation) if self._lead(item, newest) else None
            case Standby():
                self.leads, self._stands_by = False, True
                if self._accept_older or self._drop_changes:
                    log.warning("--accept-older and --drop-changes are for whoever leads now, and forgotten here")
                    self._accept_older = self._drop_changes = False
                log.info("another aggregator leads run %s; standing by", self.run_name)
                return None
            case Disconnected(generation, error):
                self.leads = False
                self._claim_again = None
                self._early.clear()
                self._to_fetch.clear()
                self._parked.clear()
                log.warning("connection to the broker lost (%s); connecting again", error)
                return on.LinkLost(generation)
            case Failed(error):
                raise error
            case _:
                return item

    def _lead(self, turn: Connected, newest: tuple[int, int] | None) -> bool:
        """It is this one's turn (again). False if the folder does not let it; that is tried again."""
        if self._led is None:
            try:
                self._led = self._claim(newest or (0, 0))
            except CheckpointNotWritten as error:
                # As from a disk that is full, or a lock whose holder hangs: leaving would help nobody.
                log.warning("cannot lead run %s yet: %s; trying again", self.run_name, error)
                self._claim_again = time.monotonic() + RETRY_SECONDS, turn
                return False
        self._require_ours()
        log.info("leads run %s at version %d, epoch %d", self.run_name, self._led.machine.version, self._led.epoch)
        self._claim_again = None
        for delivery in self._early:
            self._inbox.put(delivery)
        self._early.clear()
        return True

    def _claim(self, newest: tuple[int, int]) -> Reign:
        reign = claim(
            self._config,
            self._store,
            self._history,
            self.folder,
            newest=newest,
            now=self._now(),
            accept_older=self._accept_older,
            drop_changes=self._drop_changes,
        )
        self.has_claimed = True
        self._admit(reign.trainers, reign.machine.model.nbytes)
        self._meter.reigns(reign)
        return reign

    def _read(self, delivery: Delivery) -> on.Happening | None:
        if self._led is None:
            if delivery.token is not None:  # it was given to this one, which cannot lead yet
                self._early.append(delivery)
            return None
        self._delivery = delivery
        if delivery.source is not Source.UPDATE:
            return self._read_aside(delivery, self._led.machine)
        token = delivery.token
        assert token is not None  # noqa: S101  (updates are always acknowledged by hand)
        if self._gate.is_shut(delivery, self._senders):
            self._transport.shed(token, delivery)
            return None
        event: on.Happening | None = too_large(token, delivery, largest_update(self._led.machine.model.nbytes))
        if event is None:
            with self._meter.decode:
                event = read_update(token, delivery, self._senders, self._signatures)
        self._meter.received(delivery, event)
        head = event.update if isinstance(event, on.Arrived) else getattr(event, "head", None)
        if head is not None and head.base_epoch > self._led.epoch:
            # A newer aggregator has spoken to this worker: the update is for it, and goes back to the queue.
            self._require_ours()
        return event

    def _fetch(self, delivery: Delivery) -> None:
        self._to_fetch.append(delivery)
        if len(self._to_fetch) == 1:
            self._look_for(delivery)

    def _look_for(self, delivery: Delivery) -> None:
        if lost := self._gate.not_looked_for(delivery, self._senders):
            self._inbox.put(replace(delivery, lost=lost))
        else:
            self._transport.fetch(delivery)

    def _fetch_next(self, item: Incoming | on.Happening) -> None:
        """If ``item`` is what was fetched, the next may come while it is folded; not while it waits for the disk."""
        if not (isinstance(item, Delivery) and self._to_fetch and self._to_fetch[0].token == item.token):
            return
        self._to_fetch.popleft()
        if self._to_fetch:
            self._look_for(self._to_fetch[0])

    def _read_aside(self, delivery: Delivery, machine: RoundMachine) -> on.Happening | None:
        who, signed = self._senders, self._signatures
        if self._gate.is_shut_aside(delivery, who):
            return None
        try:
            message = from_aside(delivery, self.run_name, machine.version, self._status.hear, who, signatures=signed)
        except WireError as error:
            if self._seldom.may(f"aside: {delivery.user}"):
                log.warning("ignored a %s message that cannot be read: %s", delivery.source, error)
            message = None
        if isinstance(message, Command) and delivery.token is not None:
            event = self._ordered(message, delivery, machine)
            if event is not None:
                return event
        elif message is not None and not isinstance(message, Command):
            if isinstance(message, on.Joined) and message.hello.role is Role.TRAINER:
                self._admit([message.hello.worker], machine.model.nbytes)
            return message
        if delivery.token is not None:
            self._transport.ack(delivery.token)
        return None

    def _admit(self, workers: Iterable[str], model_bytes: int) -> None:
        """Whoever trains a model that does not fit into one message needs an outbox."""
        for worker in workers:
            if self._announcer.is_in_chunks(model_bytes):
                self._transport.admit(worker)

    def _ordered(self, command: Command, delivery: Delivery, machine: RoundMachine) -> on.Ordered | None:
        try:
            who, signed, now = self._senders, self._signatures, self._now()
            event = ordered(command, delivery, machine, self._config, senders=who, signatures=signed, now=now)
        except ConfigError as error:
            log.warning("refused a command: %s", error)
            self._reporter.progress("command", machine.version, id=command.id, accepted=False, text=str(error)[:500])
            return None
        what = shown(command.changes) if command.changes else ""
        self._reporter.expect(command.id, f"{command.action} {what}".strip())
        return event

    # ----------------------------------------------------------------------------------------- the deeds

    def _perform(self, effect: do.Effect) -> None:
        match effect:
            case do.Ack(token):
                self._transport.ack(token)
            case do.Fetch():
                assert self._delivery is not None  # noqa: S101  (it answers the delivery at hand)
                self._fetch(self._delivery)
            case do.Reject(token, reason, detail):
                assert self._delivery is not None  # noqa: S101  (a rejection answers the delivery at hand)
                self._transport.reject(token, reason, detail, self._delivery)
            case do.WriteCheckpoint(commit, snapshot):
                self._announcer.prepare(snapshot)
                self._room.writing = self._writer.write(commit, snapshot, beside=self._sync, after=self._tidy_up)
                self._meter.writing(self._room.writing.outcome)
            case do.Broadcast():
                self._meter.broadcasting(self._announcer.broadcast(effect), effect.model.nbytes)
            case do.Tell(worker, reason, detail, update):
                self._reporter.tell(worker, reason, detail, update)
            case do.WakeAt(moment):
                self._wake_at = moment
            case do.Finish(reason):
                self._finish = reason
            case do.Record(fact):
                assert self._led is not None  # noqa: S101  (facts come from its machine)
                if isinstance(fact, do.Folded) and self._led.archive is not None:
                    self._keep(self._led.archive)
                self._reporter.record(fact, self._led.machine.version)

    def _keep(self, archive: UpdateArchive) -> None:
        """Keep the update that was just folded, as one message, however it came."""
        assert self._delivery is not None and isinstance(self._arrival, on.Arrived)  # noqa: S101, PT018
        whole = [self._delivery.body] if self._delivery.chunks is None else encode_parts(self._arrival.update)
        archive.add(*whole)

    def _sync(self) -> None:
        """Make durable what the history and the kept updates have. Raises :class:`CheckpointNotWritten`."""
        self._history.sync()
        if self._led is not None and self._led.archive is not None:
            self._led.archive.sync()

    def _tidy_up(self, snapshot: Snapshot) -> None:
        if self._led is not None:
            self._led.keep_another_base(self._store, snapshot)
            self._led.spool.sweep(self._store.needed_rows)

    # ---------------------------------------------------------------------------------------- the results

    def _write_results(self) -> Outcome | None:
        if self._led is None:
            return None
        machine, reporter = self._led.machine, self._reporter
        outcome = Outcome.of(machine, self._finish or "", self._led.epoch, reporter.metrics, reporter.federated)
        log.info("run %s %s at version %d; results in %s", self.run_name, outcome.reason, outcome.version, self.folder)
        if self._led.begun_at == (outcome.version, True) and is_written(self.folder):
            return outcome  # the run had been done before: what was written then still stands
        seconds = self._now() - self._led.started
        write_results(self.folder, self._store, outcome, machine.parameters, seconds=seconds)
        return outcome
