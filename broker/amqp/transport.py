"""The port of ``broker.transport`` over RabbitMQ.

Each side has two connections, one to publish and one to consume, because RabbitMQ stops reading from a
connection that publishes while it is short of memory or disk, and acknowledgements must still get through.
"""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from concurrent.futures import Future
from typing import Any

import pika

from broker.amqp.connection import pause
from broker.amqp.declare import bind, declare, declare_again, declare_outbox, names_of
from broker.amqp.notices import Notices
from broker.amqp.outboxes import Outboxes
from broker.amqp.publisher import plain
from broker.amqp.session import Channel
from broker.amqp.side import OWN_QUEUE_LENGTH, Side, delivery_of
from broker.amqp.turn import Turn
from broker.amqp.upload import Route
from broker.amqp.versions import newest_broadcast
from broker.amqp.workerside import AmqpWorkerTransport
from broker.errors import BrokerError, MessageTooLarge, PublishRefused, Unroutable
from broker.letters import kept_headers, kept_id
from broker.messages import NAME_PATTERN, Reason
from broker.settings import BrokerConfig
from broker.topology import DEAD, EVENTS, Topology
from broker.transport import HEARD, Believe, Delivery, Outgoing, Sink, Source, Standby, Token, largest_update

__all__ = ["AmqpAggregatorTransport", "AmqpWorkerTransport"]

log = logging.getLogger("fedmq.broker")

CONTROL_PREFETCH = 100


class AmqpAggregatorTransport(Side):
    """The aggregator's side.

    Args:
        config: the table ``[broker]``.
        topology: the run's names.
        model_bytes: size of one version, by which the stream of versions is dimensioned.
        prefetch: how many updates may be unacknowledged. More than a commit covers, else nothing goes on.
        consumer_tag: what the admin UI shows for its consumers.
        epoch_after: under which epoch it will lead if the newest broadcast is of the one that is given, None if that is
            not known; consumers of whoever leads show it.
    """

    def __init__(
        self,
        config: BrokerConfig,
        topology: Topology,
        *,
        model_bytes: int,
        prefetch: int,
        consumer_tag: str = "aggregator",
        epoch_after: Callable[[int], int | None] = lambda _newest: None,
    ) -> None:
        route = Route((topology.chunks, ""), (topology.parameters, ""), "parameters")
        super().__init__(config, topology, "aggregator", route=route, stream=topology.chunks)
        self._config = config
        self._model_bytes = model_bytes
        self._largest = largest_update(model_bytes)
        self._prefetch = prefetch
        self._consumer_tag = consumer_tag
        self._epoch_after = epoch_after
        self._channel: Channel | None = None
        # Of this generation, by delivery tag: the routing key and properties, for a copy in the dead letters.
        self._unacked: dict[int, tuple[str, pika.BasicProperties]] = {}
        self._newest: Outgoing | None = None
        # One broadcast is with the publisher, and the newest of those that came since waits: while the broker
        # takes nothing, versions that nobody will read must not pile up.
        self._broadcasting = False
        self._next: tuple[Outgoing, Future[None]] | None = None
        self._has_declared = False
        self._deeds: set[asyncio.Task[None]] = set()
        self._turn = Turn(topology, self._publisher, standby=self._stand_by)
        self._admitted: set[str] = set()
        self._believe: Believe = lambda _delivery: True
        # What a broker holds for a connection comes back once it has given it up, which takes two heartbeats.
        self._outboxes = Outboxes(topology, 2.5 * config.heartbeat, self._hand)
        self._notices = Notices(topology, self._send_notice)

    def open(self, sink: Sink, *, wait: float = 0.0, believe: Believe | None = None) -> None:
        """See the port."""
        self._believe = believe or self._believe
        super().open(sink, wait=wait)

    def admit(self, worker: str) -> None:
        """See the port."""
        self._consumer.call(self._admit, worker)

    def fetch(self, delivery: Delivery) -> None:
        """See the port."""
        self._consumer.call(self._fetch, delivery)

    def ack(self, token: Token) -> None:
        """See the port."""
        self._consumer.call(self._ack, token)

    def reject(self, token: Token, reason: Reason, detail: str, delivery: Delivery) -> None:
        """See the port. Tried again until it succeeds or the connection that the token is of has gone."""
        facts: dict[str, str | int] = {"reason": reason.value, "detail": detail[:500], "time": int(time.time())}
        if delivery.user:  # the copy is the aggregator's own message
            facts["user"] = delivery.user
        body = delivery.body
        if reason is Reason.TOO_LARGE:
            facts["body"], body = f"{delivery.nbytes} bytes, left out", b""
        if "chunks" in delivery.headers:
            facts["body"], body = f"{delivery.headers.get('bytes', 0)} bytes, left out", b""
            if delivery.chunks is None and not delivery.lost:
                self._consumer.call(self._discard, token, delivery)
        self._consumer.call(self._bury, token, facts, body)

    def shed(self, token: Token, delivery: Delivery) -> None:
        """See the port."""
        if "chunks" in delivery.headers:
            self._consumer.call(self._discard, token, delivery)
        self._consumer.call(self._ack, token)

    def broadcast(self, message: Outgoing) -> Future[None]:
        """See the port. Tried again until it succeeds or a newer one has taken its place."""
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()
        with self._lock:
            self._newest = message
            replaced, self._next = self._next, (message, future)
        if replaced is not None:
            replaced[1].set_exception(PublishRefused("a newer version has taken its place"))
        self._broadcast_next()
        return future

    def prepare(self, message: Outgoing) -> None:
        """See the port."""
        if message.chunks:
            with self._lock:
                if self._newest is not None and self._newest.message_id != message.message_id:
                    self._newest = None  # it has a successor: two versions' memory is enough
            self._uploader.prepare(message)

    def notify(self, worker: str, message: Outgoing) -> None:
        """See the port."""
        self._consumer.call(self._notices.tell, worker, message)

    def event(self, kind: str, message: Outgoing) -> None:
        """See the port."""
        self._publisher.send(EVENTS, self._topology.event_key(kind, "aggregator"), message, kind=kind)

    # ------------------------------------------------------------------------------- on the links' threads

    async def _prepare(self, channel: Channel) -> None:
        gone = await self._declare(channel, makes_room=True)
        if f"queue {self._topology.chunks}" in gone:
            self._uploader.forget()
        streams = {f"queue {self._topology.parameters}", f"queue {self._topology.chunks}"}
        if streams & set(gone) and self._newest is not None and self._connected:
            # Else whoever joins finds nothing in the new stream until the next version.
            self.broadcast(self._newest)

    async def _declare(self, channel: Channel, *, makes_room: bool = False) -> tuple[str, ...]:
        """Declare what the run needs; what was there once and was missing, see :func:`declare_again`."""
        gone: tuple[str, ...] = ()
        if self._has_declared:
            gone = await declare_again(channel, self._topology, self._config, self._model_bytes, makes_room=makes_room)
        else:
            await declare(channel, self._topology, self._config, self._model_bytes, makes_room=makes_room)
        self._has_declared = True
        for worker in sorted(self._admitted):
            await declare_outbox(channel, self._topology, self._config, worker, self._model_bytes)
        return gone

    async def _consume(self, channel: Channel) -> None:
        await self._declare(channel)
        tag = self._consumer_tag
        await self._turn.take(channel, tag)
        stream = self._topology.parameters
        newest = None if self._generation else await newest_broadcast(channel, stream, believe=self._believe)
        if (epoch := self._epoch_after(newest[0] if newest else 0)) is not None:
            tag = f"{tag}/epoch {epoch}"
        events = self._topology.own_queue("events", secrets.token_hex(4))
        await channel.declare_own_queue(events, OWN_QUEUE_LENGTH)
        await self._bind_events(channel, events)
        generation = self._stand(newest)
        self._channel = channel
        self._outboxes.start(channel, alone=generation == 1 and newest is None)
        self._notices.start(channel)

        def on_update(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
            self._unacked[method.delivery_tag] = (method.routing_key, properties)
            token = Token(generation, method.delivery_tag)
            # So many may wait as are prefetched: giants would take all memory before anybody looks at the first.
            body, left_out = (body, 0) if len(body) <= self._largest else (b"", len(body))
            delivery = delivery_of(
                Source.UPDATE, body, properties, token=token, redelivered=method.redelivered, left_out=left_out
            )
            self._outboxes.announce(token, delivery, method.routing_key.rpartition(".")[2])
            self._hand(delivery)

        def on_control(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
            if method.routing_key == self._topology.command_key:
                self._unacked[method.delivery_tag] = (method.routing_key, properties)
                token = Token(generation, method.delivery_tag)
                self._hand(delivery_of(Source.CONTROL, body, properties, token=token, redelivered=method.redelivered))
                return
            worker = method.routing_key.rpartition(".")[2]
            if re.fullmatch(NAME_PATTERN, worker):
                self._notices.welcome(worker)
            self._hand(delivery_of(Source.CONTROL, body, properties, redelivered=method.redelivered))
            channel.raw.basic_ack(method.delivery_tag)

        def on_event(_method: object, properties: pika.BasicProperties, body: bytes) -> None:
            self._hand(delivery_of(Source.EVENT, body, properties))

        await channel.consume(events, on_event, tag=f"{tag}-events")
        await channel.consume(self._topology.control, on_control, tag=f"{tag}-control", prefetch=CONTROL_PREFETCH)
        await channel.consume(self._topology.updates, on_update, tag=tag, prefetch=self._prefetch)
        self._consumer.mark_up()
        await self._turn.keep(channel, lambda: self._look_after(channel, events))

    async def _look_after(self, channel: Channel, events: str) -> None:
        """Raise :class:`Unroutable` if something that the run needs is gone; and bind once more what may not be."""
        exchanges, queues = names_of(self._topology)
        outboxes = tuple(self._topology.outbox(worker) for worker in sorted(self._admitted))
        await channel.session.require(exchanges=exchanges, queues=(*queues, *outboxes))
        await bind(channel, self._topology)
        await self._bind_events(channel, events)

    async def _bind_events(self, channel: Channel, events: str) -> None:
        for kind in HEARD:
            await channel.bind(events, EVENTS, self._topology.event_key(kind, "*"))

    def _send_notice(self, worker: str, message: Outgoing) -> None:
        self._publisher.send(EVENTS, self._topology.notice_key(worker), message, kind="notice")

    def _stand_by(self) -> None:
        self._consumer.mark_up()
        self._hand(Standby())

    def _down(self, reason: BrokerError) -> None:
        self._channel = None
        self._unacked.clear()
        self._outboxes.stop()
        self._notices.stop()
        super()._down(reason)

    def _is_current(self, token: Token) -> bool:
        return self._channel is not None and token.generation == self._generation and token.tag in self._unacked

    def _ack(self, token: Token) -> None:
        # An unknown tag would cost the channel, and with it every unacknowledged update.
        if self._is_current(token) and self._channel is not None and self._channel.raw.is_open:
            del self._unacked[token.tag]
            # First the chunks: of an update whose manifest is still there, and which is known, nothing else is asked.
            self._outboxes.ack(token)
            self._channel.raw.basic_ack(token.tag)

    def _admit(self, worker: str) -> None:
        if worker in self._admitted:
            return
        self._admitted.add(worker)
        if self._channel is not None:
            channel = self._channel
            self._keep(
                declare_outbox(channel, self._topology, self._config, worker, self._model_bytes, makes_room=True)
            )

    def _keep(self, deed: Coroutine[Any, Any, None]) -> None:
        """Do it beside everything else; if it fails, the channel ends, and all is declared again on the next."""
        task = asyncio.get_running_loop().create_task(deed)
        self._deeds.add(task)

        def done(_task: asyncio.Task[None]) -> None:
            self._deeds.discard(task)
            if not task.cancelled() and isinstance(error := task.exception(), BrokerError):
                self._consumer.renew(error)

        task.add_done_callback(done)

    def _fetch(self, delivery: Delivery) -> None:
        token = delivery.token
        if token is not None and self._is_current(token):
            self._outboxes.fetch(token, delivery)

    def _discard(self, token: Token, delivery: Delivery) -> None:
        if self._is_current(token):
            self._outboxes.discard(token, delivery)

    def _bury(self, token: Token, facts: Mapping[str, str | int], body: bytes, attempt: int = 1) -> None:
        if not self._is_current(token):
            return
        key, properties = self._unacked[token.tag]
        headers = {**kept_headers(plain(properties.headers)), **facts}
        copy = Outgoing(body=body, message_id=kept_id(properties.message_id or ""), headers=headers)
        kind = kept_id(properties.type or "update")
        future = self._publisher.publish(DEAD, self._dead_key(key), copy, kind=kind)
        future.add_done_callback(lambda done: self._buried(done.exception(), token, facts, body, attempt))

    def _dead_key(self, key: str) -> str:
        """Where a copy is bound to arrive. A message that was put into the queue directly has any key."""
        run, _, worker = key.partition(".")
        is_ours = run == self._topology.run and re.fullmatch(NAME_PATTERN, worker)
        return key if is_ours else self._topology.key("unknown")

    def _buried(
        self, error: BaseException | None, token: Token, facts: Mapping[str, str | int], body: bytes, attempt: int
    ) -> None:
        if error is None:
            self._dead_letters += 1
            self.ack(token)
            return
        if self._seldom.may("buried"):
            log.warning("a rejected update is not yet in the dead letters: %s", error)
        if isinstance(error, MessageTooLarge):
            # The limit was lowered since the update came in: its reason and its identity still get through.
            facts, body = {**facts, "body": f"{len(body)} bytes, left out"}, b""
        self._redeclare_for(error)
        self._consumer.call(self._bury, token, facts, body, attempt + 1, after=pause(attempt))

    def _broadcast_next(self) -> None:
        with self._lock:
            if self._broadcasting or self._next is None:
                return
            (message, future), self._next = self._next, None
            self._broadcasting = True
        future.add_done_callback(self._broadcast_over)
        self._broadcast(message, future)

    def _broadcast_over(self, _future: Future[None]) -> None:
        self._broadcasting = False
        self._broadcast_next()

    def _broadcast(self, message: Outgoing, future: Future[None], attempt: int = 1) -> None:
        if message.chunks:
            sent = self._uploader.send(message)
        else:
            sent = self._publisher.publish(self._topology.parameters, "", message, kind="parameters")
        sent.add_done_callback(lambda done: self._broadcast_done(done.exception(), message, future, attempt))

    def _broadcast_done(
        self, error: BaseException | None, message: Outgoing, future: Future[None], attempt: int
    ) -> None:
        if error is None:
            future.set_result(None)
            return
        again = isinstance(error, BrokerError) and error.retryable and message is self._newest
        if again:
            self._redeclare_for(error)
            again = self._publisher.link.call(self._broadcast, message, future, attempt + 1, after=pause(attempt))
        if not again:
            future.set_exception(error)

    def _redeclare_for(self, error: BaseException) -> None:
        if isinstance(error, Unroutable):
            self._publisher.link.call(self._publisher.link.renew, error)
