"""An in-process broker with RabbitMQ's delivery rules: acknowledgement, redelivery, prefetch, dead letters.

It carries encoded bytes, never objects, so that whatever works over it has been through the wire format. It
keeps nothing on disk. Messages are handed to the sinks while the call that caused them runs, in the caller's
thread; with one thread, everything is therefore deterministic.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

from broker.errors import BrokerUnreachable, MessageTooLarge, PublishRefused, Unroutable
from broker.messages import Reason
from broker.topology import Topology
from broker.transport import (
    HEARD,
    Believe,
    Connected,
    Delivery,
    Disconnected,
    Incoming,
    Outgoing,
    Sink,
    Source,
    Standby,
    Token,
)

__all__ = ["DeadLetter", "MemoryAggregatorTransport", "MemoryBroker", "MemoryWorkerTransport"]

#: RabbitMQ 3.10's default; the contract tests send one byte more.
MAX_MESSAGE_BYTES = 128 * 2**20


@dataclass(frozen=True, slots=True)
class DeadLetter:
    """A rejected update."""

    delivery: Delivery
    reason: Reason
    detail: str


@dataclass(slots=True)
class _Run:
    """Queues of one run. ``waiting`` is the durable update queue; it outlives every consumer."""

    waiting: deque[Delivery] = field(default_factory=deque)
    control: deque[Delivery] = field(default_factory=deque)
    commands: deque[Delivery] = field(default_factory=deque)
    dead: list[DeadLetter] = field(default_factory=list)
    chunks: dict[str, tuple[bytes, ...]] = field(default_factory=dict)
    """Of updates that are not acknowledged yet, by message id."""
    newest: Outgoing | None = None
    aggregators: list[MemoryAggregatorTransport] = field(default_factory=list)
    workers: list[MemoryWorkerTransport] = field(default_factory=list)
    watchers: list[Sink] = field(default_factory=list)
    declared: bool = False
    """As on RabbitMQ, a run exists from the first time that an aggregator opened it."""


class MemoryBroker:
    """All runs of one process."""

    def __init__(self, *, max_message_bytes: int = MAX_MESSAGE_BYTES, max_waiting: int | None = None) -> None:
        """Args: ``max_waiting`` is the update queue's limit (reject-publish), None for no limit."""
        self.max_message_bytes = max_message_bytes
        self.max_waiting = max_waiting
        self._runs: dict[str, _Run] = {}
        self._lock = threading.RLock()
        self._outbox: deque[tuple[Sink, Incoming]] = deque()

    def aggregator(self, run: str, *, prefetch: int = 64) -> MemoryAggregatorTransport:
        """An aggregator's endpoint; of several for one run only the first that opened consumes."""
        return MemoryAggregatorTransport(self, Topology(run), prefetch)

    def worker(self, run: str, name: str) -> MemoryWorkerTransport:
        """A worker's endpoint."""
        return MemoryWorkerTransport(self, Topology(run), name)

    def watch(self, run: str, sink: Sink) -> None:
        """Hand every event of ``run`` to ``sink``, for displays."""
        with self.turn():
            self._runs.setdefault(run, _Run()).watchers.append(sink)

    def command(self, run: str, message: Outgoing) -> None:
        """What an operator asks of the run's aggregator, now or later."""
        with self.turn():
            command = Delivery(source=Source.CONTROL, body=message.body, headers=message.headers, user="operator")
            self.run(run).commands.append(command)
            self.pump(self.run(run))

    def dead_letters(self, run: str) -> list[DeadLetter]:
        """What was rejected so far."""
        with self.turn():
            return list(self.run(run).dead)

    def depth(self, run: str) -> int:
        """Updates that wait and are not in an aggregator's hands."""
        with self.turn():
            return len(self.run(run).waiting)

    # ---------------------------------------------------------------------------------- for the endpoints

    @contextmanager
    def turn(self) -> Iterator[None]:
        """One change of the broker's state; what it causes to be delivered is delivered when it is complete."""
        with self._lock:
            yield
            while self._outbox:
                sink, item = self._outbox.popleft()
                sink(item)

    def run(self, name: str) -> _Run:
        """The run's queues, made on first use."""
        return self._runs.setdefault(name, _Run())

    def hand(self, sink: Sink | None, item: Incoming) -> None:
        """Deliver ``item`` at the end of this turn."""
        if sink is not None:
            self._outbox.append((sink, item))

    def pump(self, run: _Run) -> None:
        """Give waiting updates to the single active consumer, up to its prefetch."""
        if not run.aggregators:
            return
        active = run.aggregators[0]
        while run.waiting and len(active.unacked) < active.prefetch:
            active.take(run.waiting.popleft())
        while run.control:
            self.hand(active.sink, run.control.popleft())
        while run.commands:
            active.take(run.commands.popleft())

    def send_event(
        self, topology: Topology, kind: str, message: Outgoing, *, user: str, notice_to: str | None = None
    ) -> None:
        """Events go to watchers, what the aggregator hears also to the active one, and notices to the one worker."""
        run = self.run(topology.run)
        delivery = Delivery(source=Source.EVENT, body=message.body, headers=message.headers, user=user)
        if notice_to is None:
            for aggregator in run.aggregators[:1] if kind in HEARD else ():
                self.hand(aggregator.sink, delivery)
        else:
            for worker in run.workers:
                if worker.name == notice_to and worker.believe(delivery):
                    self.hand(worker.sink, delivery)
        for watcher in run.watchers:
            self.hand(watcher, delivery)


class _Endpoint:
    """What both sides' connections have in common."""

    def __init__(self, broker: MemoryBroker, topology: Topology, account: str) -> None:
        #: See the port. As on a RabbitMQ with an account for each.
        self.account = account
        self.sink: Sink | None = None
        self.generation = 0
        self._broker = broker
        self._topology = topology

    @property
    def _run(self) -> _Run:
        return self._broker.run(self._topology.run)

    @property
    def max_message_bytes(self) -> int:
        """See the port."""
        return self._broker.max_message_bytes

    def _check_size(self, body: bytes) -> None:
        if len(body) > self._broker.max_message_bytes:
            raise MessageTooLarge(f"{len(body)} bytes; the limit is {self._broker.max_message_bytes}")

    def _taken(self, message: Outgoing) -> tuple[bytes, ...]:
        """The chunks of ``message``, made now: the sender may not lend its tensors for longer."""
        self._check_size(message.body)
        chunks = tuple(message.chunks)
        for chunk in chunks:
            self._check_size(chunk)
        return chunks

    def event(self, kind: str, message: Outgoing) -> None:
        """See the port."""
        with self._broker.turn():
            if self.sink is not None:
                self._broker.send_event(self._topology, kind, message, user=self.account)


class MemoryAggregatorTransport(_Endpoint):
    """The port's aggregator side, in this process."""

    def __init__(self, broker: MemoryBroker, topology: Topology, prefetch: int) -> None:
        """Use :meth:`MemoryBroker.aggregator`."""
        super().__init__(broker, topology, "aggregator")
        self.prefetch = prefetch
        self.unacked: dict[int, Delivery] = {}
        self._next_tag = 0
        self._has_led = False

    def open(self, sink: Sink, *, wait: float = 0.0, believe: Believe | None = None) -> None:
        """See the port. Never waits, and believes: nobody else is in this process."""
        del wait, believe
        with self._broker.turn():
            self.sink = sink
            self._connect()

    def drop(self) -> None:
        """Cut the connection and make it again: for tests and simulations."""
        with self._broker.turn():
            self._disconnect()
            self._broker.hand(self.sink, Disconnected(self.generation, "cut"))
            self._connect()

    def ack(self, token: Token) -> None:
        """See the port."""
        with self._broker.turn():
            if token.generation == self.generation and token.tag in self.unacked:
                self._forget(token)

    def _forget(self, token: Token) -> None:
        delivery = self.unacked.pop(token.tag)
        message_id = delivery.headers.get("message_id")
        rest = [*self.unacked.values(), *self._run.waiting]
        if not any(other.headers.get("message_id") == message_id for other in rest):
            self._run.chunks.pop(str(message_id), None)
        self._broker.pump(self._run)

    def admit(self, worker: str) -> None:
        """See the port. Nothing is needed here."""

    def fetch(self, delivery: Delivery) -> None:
        """See the port."""
        with self._broker.turn():
            if delivery.token is None or delivery.token.generation != self.generation:
                return
            found = self._run.chunks.get(str(delivery.headers.get("message_id")))
            lost = "" if found is not None else "none of its chunks are there"
            self._broker.hand(self.sink, replace(delivery, chunks=found, lost=lost))

    def reject(self, token: Token, reason: Reason, detail: str, delivery: Delivery) -> None:
        """See the port."""
        with self._broker.turn():
            if token.generation != self.generation or token.tag not in self.unacked:
                return
            self._run.dead.append(DeadLetter(replace(delivery, chunks=None), reason, detail))
            self._forget(token)

    def shed(self, token: Token, delivery: Delivery) -> None:
        """See the port."""
        del delivery
        self.ack(token)

    def broadcast(self, message: Outgoing) -> Future[None]:
        """See the port."""
        future: Future[None] = Future()
        with self._broker.turn():
            try:
                chunks = self._taken(message)
            except MessageTooLarge as error:
                future.set_exception(error)
                return future
            self._run.newest = message = replace(message, chunks=chunks)
            for worker in self._run.workers:
                worker.offer(message)
        future.set_result(None)
        return future

    def prepare(self, message: Outgoing) -> None:
        """See the port. Nothing is sent before it must be."""

    def notify(self, worker: str, message: Outgoing) -> None:
        """See the port."""
        with self._broker.turn():
            if self.sink is not None:
                self._broker.send_event(self._topology, "notice", message, user=self.account, notice_to=worker)

    def close(self) -> None:
        """See the port."""
        with self._broker.turn():
            self._disconnect()
            self.sink = None

    def take(self, delivery: Delivery) -> None:
        """One update into this consumer's hands. The broker calls this."""
        self._next_tag += 1
        mine = replace(delivery, token=Token(self.generation, self._next_tag))
        self.unacked[self._next_tag] = mine
        self._broker.hand(self.sink, mine)

    def lead(self) -> None:
        """It is this one's turn. The broker calls this."""
        self.generation += 1
        newest = self._run.newest
        known = None if newest is None or self._has_led else (_int(newest, "epoch"), _int(newest, "version"))
        self._has_led = True
        self._broker.hand(self.sink, Connected(self.generation, known))
        self._broker.pump(self._run)

    def _connect(self) -> None:
        self._run.declared = True
        self._run.aggregators.append(self)
        if self._run.aggregators[0] is self:
            self.lead()
        else:
            self._broker.hand(self.sink, Standby())

    def _disconnect(self) -> None:
        if self in self._run.aggregators:
            led = self._run.aggregators[0] is self
            self._run.aggregators.remove(self)
            back = [replace(d, token=None, redelivered=True) for d in self.unacked.values()]
            self._run.waiting.extendleft(d for d in reversed(back) if d.source is Source.UPDATE)
            self._run.commands.extendleft(d for d in reversed(back) if d.source is Source.CONTROL)
            self.unacked.clear()
            if led and self._run.aggregators:
                self._run.aggregators[0].lead()


class MemoryWorkerTransport(_Endpoint):
    """The port's worker side, in this process."""

    def __init__(self, broker: MemoryBroker, topology: Topology, name: str) -> None:
        """Use :meth:`MemoryBroker.worker`."""
        super().__init__(broker, topology, name)
        self.name = name
        self.believe: Believe = lambda _delivery: True
        self._last: tuple[int, int, int] = (-1, -1, -1)

    def open(self, sink: Sink, *, wait: float = 0.0, believe: Believe | None = None) -> None:
        """See the port. Never waits."""
        del wait
        with self._broker.turn():
            self.believe = believe or self.believe
            self.sink = sink
            self._connect()

    def drop(self) -> None:
        """Cut the connection and make it again: for tests and simulations."""
        with self._broker.turn():
            self._run.workers.remove(self)
            self._broker.hand(self.sink, Disconnected(self.generation, "cut"))
            self._connect()

    def publish(self, message: Outgoing) -> Future[None]:
        """See the port."""
        return self._send(message, Source.UPDATE)

    def control(self, message: Outgoing) -> Future[None]:
        """See the port."""
        return self._send(message, Source.CONTROL)

    def close(self) -> None:
        """See the port."""
        with self._broker.turn():
            if self in self._run.workers:
                self._run.workers.remove(self)
            self.sink = None

    def offer(self, message: Outgoing) -> None:
        """A version, handed on if it is newer than the last. The broker calls this."""
        order = (_int(message, "epoch"), _int(message, "version"), _int(message, "attempt"))
        headers = {**message.headers, "message_id": message.message_id}
        delivery = Delivery(source=Source.PARAMETERS, body=message.body, headers=headers, user="aggregator")
        if order > self._last and self.believe(delivery):
            self._last = order
            self._broker.hand(self.sink, delivery)

    def fetch(self, delivery: Delivery, part: range | None = None) -> None:
        """See the port. Only the newest version's chunks are kept."""
        with self._broker.turn():
            newest = self._run.newest
            is_there = newest is not None and newest.message_id == delivery.headers.get("message_id")
            chunks = None
            if newest is not None and is_there:
                wanted = range(len(newest.chunks)) if part is None else part
                chunks = tuple(newest.chunks[index] for index in wanted)
            self._broker.hand(self.sink, replace(delivery, chunks=chunks, lost="" if is_there else "it is past"))

    def _send(self, message: Outgoing, source: Source) -> Future[None]:
        future: Future[None] = Future()
        try:
            with self._broker.turn():
                self._accept(message, source)
        except (BrokerUnreachable, MessageTooLarge, PublishRefused, Unroutable) as error:
            future.set_exception(error)
        else:
            future.set_result(None)
        return future

    def _accept(self, message: Outgoing, source: Source) -> None:
        if self.sink is None:
            raise BrokerUnreachable("this transport is not open")
        chunks = self._taken(message)
        run = self._run
        if not run.declared:
            raise Unroutable(f"no aggregator has declared run {self._topology.run!r} yet")
        limit = self._broker.max_waiting
        if source is Source.UPDATE and limit is not None and len(run.waiting) >= limit:
            raise PublishRefused(f"the queue of updates is full ({limit})")
        queue = run.waiting if source is Source.UPDATE else run.control
        if chunks:
            run.chunks[message.message_id] = chunks
        headers = {**message.headers, "message_id": message.message_id}
        queue.append(Delivery(source=source, body=message.body, headers=headers, user=self.account))
        self._broker.pump(run)

    def _connect(self) -> None:
        self.generation += 1
        self._run.workers.append(self)
        self._broker.hand(self.sink, Connected(self.generation))
        if self._run.newest is not None:
            self.offer(self._run.newest)


def _int(message: Outgoing, header: str) -> int:
    value = message.headers.get(header, 0)
    return value if isinstance(value, int) else 0
