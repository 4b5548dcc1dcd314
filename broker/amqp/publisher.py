"""Pipelined publishing: any number of messages on their way, each with a future for its confirmation."""

from __future__ import annotations

import struct
import time
import uuid
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import pika
import pika.exceptions

from broker.amqp.connection import Link
from broker.amqp.refusals import limit_of, verdict
from broker.amqp.session import Channel
from broker.errors import BrokerError, BrokerUnreachable, MessageTooLarge, PublishRefused, Unroutable
from broker.seldom import Seldom
from broker.settings import BrokerConfig
from broker.transport import Outgoing

__all__ = ["Publisher", "plain"]

Prepare = Callable[[Channel], Awaitable[None]]

#: What every RabbitMQ takes unless its operator has changed it.
SMALLEST_LIMIT = 16 * 2**20

# How often to look again whether pika has sent enough of what it was given.
PUMP_SECONDS = 0.002
#: Messages that wait, as while the broker is away, beyond which what may get lost is.
MOST_WAITING = 1000


@dataclass(slots=True)
class _Publication:
    exchange: str
    key: str
    body: bytes
    properties: pika.BasicProperties
    mandatory: bool
    future: Future[None] | None
    returned: str = ""

    def settle(self, error: BrokerError | None = None) -> None:
        if self.future is None:
            return
        if error is None:
            self.future.set_result(None)
        else:
            self.future.set_exception(error)


class Publisher:
    """A link that publishes.

    Args:
        config: the broker; its ``max_message_bytes`` is the limit, if set.
        name: the connection's name.
        prepare: declares what is published to, or waits for it, on each new channel.
        failed: called on the link's thread when reconnecting is pointless.
        seldom: see :class:`Link`.
    """

    def __init__(
        self,
        config: BrokerConfig,
        name: str,
        *,
        prepare: Prepare,
        failed: Callable[[BrokerError], None],
        seldom: Seldom | None = None,
    ) -> None:
        self.link = Link(config, name, use=self._attach, down=self._detach, failed=self._fail, seldom=seldom)
        self._prepare = prepare
        self._failed = failed
        self._limit = config.max_message_bytes
        self._default_limit = SMALLEST_LIMIT
        self._channel: Channel | None = None
        self._waiting: deque[_Publication] = deque()
        self._on_way: dict[int, _Publication] = {}
        self._tag = 0
        self._refusal: BrokerError | None = None
        self._end: BrokerError = BrokerUnreachable("this transport is not open")
        self._ended = False
        self._flushes: list[Future[None]] = []
        self._looks_again = False

    @property
    def max_message_bytes(self) -> int:
        """The largest body that the broker takes: as set, as it said when it refused one, or its default."""
        return self._limit or self._default_limit

    def start(self) -> None:
        """Start connecting; returns at once."""
        self._end = BrokerUnreachable("this transport was closed before the message was sent")
        self.link.start()

    def publish(self, exchange: str, key: str, message: Outgoing, *, kind: str) -> Future[None]:
        """Publish durably; the future is done once the broker has confirmed.

        While there is no connection the message waits for one. The future fails with :class:`Unroutable`,
        :class:`PublishRefused`, :class:`MessageTooLarge`, :class:`ConnectionLost` (it may or may not have
        arrived), or with what the link failed of.
        """
        future: Future[None] = Future()
        future.set_running_or_notify_cancel()  # from here on nobody can cancel it
        properties = _properties(message, kind, persistent=True)
        self._enqueue(_Publication(exchange, key, message.body, properties, mandatory=True, future=future))
        return future

    def send(self, exchange: str, key: str, message: Outgoing, *, kind: str) -> None:
        """Publish something that may get lost, as it does where too much waits for the broker already."""
        if len(self._waiting) >= MOST_WAITING:
            return
        properties = _properties(message, kind, persistent=False)
        self._enqueue(_Publication(exchange, key, message.body, properties, mandatory=False, future=None))

    def flush(self, timeout: float) -> None:
        """Wait until everything is confirmed, the connection is lost, or ``timeout`` seconds have passed."""
        done: Future[None] = Future()
        if self.link.call(self._flush, done):
            try:
                done.result(timeout)
            except TimeoutError:
                return

    def refuse(self, error: BrokerError) -> None:
        """Until the next set-up is complete nothing can be published, for this reason. Link's thread only."""
        self._refusal = error
        self._pump()

    def give_up(self, error: BrokerError) -> None:
        """Stop without waiting; everything fails with ``error``, now and from now on."""
        self._end = error
        self._ended = True
        self.link.stop(0)
        if not self.link.call(self._abandon):
            self._abandon()

    def stop(self) -> None:
        """Stop; what was not sent fails with :class:`BrokerUnreachable`."""
        self._ended = True
        self.link.stop()
        self._abandon()

    # --------------------------------------------------------------------------------- on the link's thread

    async def _attach(self, channel: Channel) -> None:
        await self._prepare(channel)
        channel.raw.add_on_return_callback(self._on_return)
        await channel.confirm(self._on_confirm)
        self._tag = 0
        self._refusal = None
        self._default_limit = channel.session.max_message_bytes
        self._channel = channel
        self._pump()

    def _detach(self, reason: BrokerError) -> None:
        self._channel = None
        self._refusal = None
        if isinstance(reason, MessageTooLarge):
            self._limit = limit_of(reason)
        lost, self._on_way = self._on_way, {}
        for publication in lost.values():
            publication.settle(verdict(reason, publication.exchange, len(publication.body)))
        self._check_flushes()

    def _fail(self, error: BrokerError) -> None:
        self._end = error
        self._ended = True
        self._abandon()
        self._failed(error)

    def _enqueue(self, publication: _Publication) -> None:
        self._waiting.append(publication)
        # In this order: whatever ends the link in between finds the message in the queue, or we find the mark.
        if self._ended or not self.link.call(self._pump):
            self._abandon()

    def _abandon(self) -> None:
        # Possibly by two threads at once, at the very end; a deque takes that.
        while self._waiting:
            try:
                publication = self._waiting.popleft()
            except IndexError:
                return
            publication.settle(self._end)

    def _pump(self) -> None:
        while self._waiting:
            if self._refusal is not None:
                self._waiting.popleft().settle(self._refusal)
            elif self._channel is None or not self._channel.raw.is_open:
                break
            elif not self._channel.session.has_room:
                if not self._looks_again:
                    self._looks_again = self.link.call(self._look_again, after=PUMP_SECONDS)
                break
            else:
                self._transmit(self._channel, self._waiting.popleft())
        self._check_flushes()

    def _look_again(self) -> None:
        self._looks_again = False
        self._pump()

    def _transmit(self, channel: Channel, publication: _Publication) -> None:
        if len(publication.body) > self.max_message_bytes:
            publication.settle(
                MessageTooLarge(
                    f"a message of {len(publication.body)} bytes; this broker takes up to {self.max_message_bytes}. "
                    "Set broker.chunk_bytes to less, or raise max_message_size in rabbitmq.conf and "
                    "broker.max_message_bytes (at most 512 MiB)"
                )
            )
            return
        # RabbitMQ refuses any other than the connection's own, so whoever receives it may believe it.
        publication.properties.user_id = channel.session.place.user
        try:
            channel.raw.basic_publish(
                publication.exchange,
                publication.key,
                publication.body,
                publication.properties,
                mandatory=publication.mandatory,
            )
        except (pika.exceptions.AMQPError, struct.error) as error:
            # pika makes all frames before it sends the first, so nothing has gone out.
            publication.settle(BrokerError(f"the message {publication.properties.message_id!r} has no form: {error!r}"))
            return
        self._tag += 1
        self._on_way[self._tag] = publication

    def _on_confirm(self, frame: Any) -> None:
        method = frame.method
        refused = isinstance(method, pika.spec.Basic.Nack)
        tags = [method.delivery_tag]
        if method.multiple:
            tags = [tag for tag in self._on_way if tag <= method.delivery_tag]
        for tag in tags:
            publication = self._on_way.pop(tag, None)
            if publication is None:
                continue
            if publication.returned:
                publication.settle(Unroutable(publication.returned))
            elif refused:
                publication.settle(PublishRefused(f"the broker did not take a message for {publication.key!r}: full?"))
            else:
                publication.settle()
        self._pump()

    def _on_return(self, _channel: object, method: Any, properties: pika.BasicProperties, _body: bytes) -> None:
        # A return comes before the confirmation but does not say of which publish. Messages with one id are
        # one message, so it does not matter which of them is marked.
        for publication in self._on_way.values():
            same = (publication.properties.message_id, publication.exchange, publication.key)
            if same == (properties.message_id, method.exchange, method.routing_key) and not publication.returned:
                publication.returned = f"no queue is bound to exchange {method.exchange!r} for {method.routing_key!r}"
                return

    def _flush(self, done: Future[None]) -> None:
        self._flushes.append(done)
        self._pump()

    def _check_flushes(self) -> None:
        if self._channel is None or self._channel.session.is_blocked or not (self._waiting or self._on_way):
            flushes, self._flushes = self._flushes, []
            for done in flushes:
                done.set_result(None)


def _properties(message: Outgoing, kind: str, *, persistent: bool) -> pika.BasicProperties:
    return pika.BasicProperties(
        content_type="application/msgpack",
        delivery_mode=2 if persistent else 1,
        app_id="fedmq",
        type=str(message.headers.get("type", kind)),
        # A returned message is recognised by its id.
        message_id=message.message_id or (uuid.uuid4().hex if persistent else None),
        timestamp=int(time.time()),
        headers=plain(message.headers),
    )


def plain(headers: Mapping[str, Any] | None) -> dict[str, str | int]:
    """Those of ``headers`` that every RabbitMQ and every queue type carries unharmed: text and integers.

    Without the broker's own (``x-…``).
    """
    return {
        str(key): value for key, value in (headers or {}).items() if _is_plain(value) and not str(key).startswith("x-")
    }


def _is_plain(value: object) -> bool:
    # pika makes whole numbers of floats, 1e300 too, and cannot write them.
    return isinstance(value, str) or (
        isinstance(value, int) and not isinstance(value, bool) and -(2**63) <= value < 2**63
    )
