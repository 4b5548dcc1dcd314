"""The simulated shell around the real round machine: a queue, a disk that takes time, crashes.

It does what ``aggregator.service`` does with threads: deliveries become events, effects become deeds. What the disk
has is a snapshot with an accumulator of its own; a crash forgets the machine and starts another one from that, under
a higher epoch, and what was not acknowledged is delivered again, in the order in which it came.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.ledger import Ledger, PlainLedger
from aggregator.core.machine import RoundMachine
from aggregator.core.rules import Rules
from aggregator.core.snapshot import Snapshot
from aggregator.reading import read_update
from broker.errors import FedmqError
from broker.messages import Update, UpdateId
from broker.transport import Delivery, Source, Token
from broker.wire import decode
from fedmq.simulation.clock import NEVER, seconds_of, ticks
from fedmq.simulation.ledger import JournaledLedger

__all__ = ["Letter", "Observer", "SimulatedAggregator"]


@dataclass(frozen=True, slots=True)
class Letter:
    """An update on its way: as bytes, or as it is."""

    content: bytes | Update
    nbytes: int
    worker: str


class Observer(Protocol):
    """Who hears what the aggregator does."""

    def broadcast(self, effect: do.Broadcast) -> None:
        """A version, or another plan for it, for all workers."""

    def record(self, fact: do.Fact) -> None:
        """Something happened."""

    def finish(self) -> None:
        """The aggregator leaves."""


class SimulatedAggregator:
    """A run's aggregator in virtual time; :meth:`at` is called with every time at which something happens.

    Args:
        rules: of the run. Workers are gone when they say so, not for silence: heartbeats are not simulated.
        snapshot: what the run starts from, durable, with epoch 0.
        prefetch: unacknowledged updates that the broker hands out.
        checkpoint_ticks: until a checkpoint is durable.
        can_crash: whether :meth:`crash` will be called, so that checkpoints have to be kept.
        observer: who hears of it.
        schedule: calls back at a time.
    """

    def __init__(
        self,
        rules: Rules,
        snapshot: Snapshot,
        *,
        prefetch: int,
        checkpoint_ticks: int,
        can_crash: bool,
        observer: Observer,
        schedule: Callable[[int, Callable[[int], None]], None],
    ) -> None:
        self._rules = replace(rules, worker_timeout=float("inf"), linger_seconds=0.0)
        self._prefetch = prefetch
        self._checkpoint_ticks = checkpoint_ticks
        self._can_crash = can_crash
        self._observer = observer
        self._schedule = schedule
        self._durable = snapshot
        self._queue: deque[Letter] = deque()
        self._unacked: dict[int, Letter] = {}
        self._generation = 0
        self._tags = 0
        self._is_delivering = False
        self._ledger = JournaledLedger()
        self._machine: RoundMachine | None = None
        self._last: RoundMachine | None = None
        self._control: deque[on.Happening] = deque()
        self.wake_at = NEVER
        """When to call :meth:`wake` at the latest."""
        self.crashes = 0

    @property
    def machine(self) -> RoundMachine:
        """The one that leads, or that led last. Raises :class:`FedmqError` before the first."""
        if self._last is None:
            raise FedmqError("the simulated aggregator was not started")
        return self._last

    @property
    def is_up(self) -> bool:
        """Whether there is one that leads."""
        return self._machine is not None

    @property
    def ledger(self) -> Ledger:
        """Which updates count."""
        return self._ledger

    def waiting_ids(self) -> list[UpdateId]:
        """Updates that the broker still has, in the queue or handed out, in the order in which they came."""
        contents = [letter.content for letter in (*self._unacked.values(), *self._queue)]
        updates = [decode(content) if isinstance(content, bytes) else content for content in contents]
        return [update.id for update in updates if isinstance(update, Update)]

    def start(self, now: int) -> None:
        """Lead, from the durable state."""
        self._generation += 1
        self._durable = replace(self._durable, epoch=self._durable.epoch + 1)
        accumulator = self._durable.accumulator.copy()
        own = replace(self._durable, accumulator=accumulator)
        self._last = self._machine = RoundMachine(self._rules, own, seconds_of(now), make_ledger=self._make_ledger)
        self.handle(on.LinkUp(self._generation), now)
        while self._control:
            self.handle(self._control.popleft(), now)
        self._deliver(now)

    def crash(self) -> None:
        """Forget everything that is not durable; the broker delivers again what was not acknowledged."""
        self.crashes += 1
        self._machine = None
        self.wake_at = NEVER
        self._queue.extendleft(reversed(self._unacked.values()))
        self._unacked.clear()

    def control(self, event: on.Happening, now: int) -> None:
        """A worker says hello or goodbye; in a queue that keeps it until there is one that leads."""
        if self._machine is None:
            self._control.append(event)
        else:
            self.handle(event, now)

    def arrive(self, letter: Letter, now: int) -> None:
        """An update has come to the queue."""
        self._queue.append(letter)
        self._deliver(now)

    def wake(self, now: int) -> None:
        """The time that the machine asked for has come."""
        self.handle(on.Tick(), now)

    def handle(self, event: on.Happening, now: int) -> None:
        """Let the machine know, and do what it wants. Lost if there is none that leads."""
        if self._machine is None:
            return
        machine, self.wake_at = self._machine, NEVER
        effects = machine.handle(event, seconds_of(now))
        written: list[do.WriteCheckpoint] = []
        for effect in effects:
            kind = type(effect)
            if kind is do.Record:
                self._observer.record(effect.fact)  # type: ignore[union-attr]
            elif kind is do.WakeAt:
                self.wake_at = max(now, ticks(effect.time) + 1)  # type: ignore[union-attr]
            else:
                self._perform(effect, written, now)
        for checkpoint in written:
            if self._checkpoint_ticks:
                self.handle(on.CheckpointCopied(checkpoint.commit), now)
            else:
                self._written(checkpoint, self._generation, now)

    def _make_ledger(self, intervals: PlainLedger) -> JournaledLedger:
        self._ledger = JournaledLedger(intervals)
        return self._ledger

    def _perform(self, effect: do.Effect, written: list[do.WriteCheckpoint], now: int) -> None:
        match effect:
            case do.Ack(token):
                self._unacked.pop(token.tag, None)
            case do.Reject(token):
                self._unacked.pop(token.tag, None)
            case do.WriteCheckpoint():
                written.append(self._begin(effect, now))
            case do.Broadcast():
                self._observer.broadcast(effect)
            case do.Tell():
                pass  # a worker whose update was refused takes the newest version in any case
            case do.Finish():
                self._observer.finish()
            case _:
                raise FedmqError(f"a simulated aggregator knows no {type(effect).__name__}")

    def _begin(self, effect: do.WriteCheckpoint, now: int) -> do.WriteCheckpoint:
        """The accumulator is the machine's to write into again before this returns."""
        snapshot = effect.snapshot
        if self._can_crash:
            snapshot = replace(snapshot, accumulator=snapshot.accumulator.copy())
        checkpoint, generation = do.WriteCheckpoint(effect.commit, snapshot), self._generation
        if self._checkpoint_ticks:
            self._schedule(now + self._checkpoint_ticks, lambda then: self._written(checkpoint, generation, then))
        return checkpoint

    def _written(self, checkpoint: do.WriteCheckpoint, generation: int, now: int) -> None:
        if self._machine is None or generation != self._generation:
            return  # the aggregator crashed while it was writing
        if self._can_crash:
            self._durable = checkpoint.snapshot
        self._ledger.forget(checkpoint.snapshot.ledger)
        self.handle(on.CheckpointWritten(checkpoint.commit), now)
        self._deliver(now)

    def _deliver(self, now: int) -> None:
        if self._is_delivering:
            return  # by way of what the update at hand has brought about; the loop below goes on
        self._is_delivering = True
        try:
            self._deliver_all(now)
        finally:
            self._is_delivering = False

    def _deliver_all(self, now: int) -> None:
        while self._queue and self._machine is not None and len(self._unacked) < self._prefetch:
            letter = self._queue.popleft()
            self._tags += 1
            token = Token(self._generation, self._tags)
            self._unacked[token.tag] = letter
            content = letter.content
            if isinstance(content, Update):
                self.handle(on.Arrived(token, content, letter.nbytes), now)
            else:
                delivery = Delivery(source=Source.UPDATE, body=content, headers={"worker": letter.worker}, token=token)
                self.handle(read_update(token, delivery), now)
