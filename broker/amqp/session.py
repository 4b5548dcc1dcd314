"""pika's callbacks as coroutines: one open connection, and its channels.

pika's asyncio adapter is the same machine as its SelectConnection with another loop under it; with it, a
set-up of a dozen replies to wait for reads from top to bottom.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import ssl
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pika
import pika.exceptions
from pika.channel import Channel as RawChannel

from broker.amqp.credentials import TokenBearer
from broker.amqp.patched import Connection, drop_late
from broker.amqp.refusals import Operation, Place, channel_error, connection_error
from broker.errors import BrokerError, ConnectionLost, Unroutable, UnsupportedBroker
from broker.tokens import Token

__all__ = ["Channel", "OnMessage", "Session", "quiet_pika", "version_of"]

log = logging.getLogger("fedmq.broker")

OnMessage = Callable[[pika.spec.Basic.Deliver, pika.BasicProperties, bytes], None]

# What may wait in pika's output buffer before the next message is cut into frames. Enough for the socket to
# stay busy until the pump looks again, little against a model.
BUFFERED_BYTES = 16 * 2**20

# How long a broker may take to agree to the end of a channel or a connection.
CLOSE_SECONDS = 2.0

OLDEST = (3, 9, 0)  # streams
NEWEST_TESTED_MAJOR = 4


def quiet_pika() -> None:
    """Silence pika's loggers, unless somebody has set a level.

    It logs each step of each failed attempt as an error, and returned messages with their bodies. What
    matters is logged by us.
    """
    logger = logging.getLogger("pika")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL + 1)


class Session:
    """One open connection. Use :meth:`connect`."""

    def __init__(self, connection: Connection, place: Place, closed: asyncio.Future[BrokerError]) -> None:
        self.place = place
        self.closed = closed
        self.is_blocked = False
        """Whether the broker takes no messages for now, and so reads nothing from this connection."""
        self.token: Token | None = None
        """What was logged in with, if that was a token."""
        self._connection = connection
        self.version = version_of(str((connection.server_properties or {}).get("version", "")))

    @classmethod
    async def connect(cls, params: pika.URLParameters) -> Session:
        """Open a connection.

        Raises :class:`BrokerUnreachable`, :class:`Untrusted`, :class:`AccessRefused` or :class:`UnsupportedBroker`.
        """
        loop = asyncio.get_running_loop()
        place = Place.of(params)
        opened: asyncio.Future[BrokerError | None] = loop.create_future()
        closed: asyncio.Future[BrokerError] = loop.create_future()

        def on_close(_connection: object, error: BaseException) -> None:
            _settle(closed, connection_error(error, place, opened=True))

        connection = Connection(
            params,
            on_open_callback=lambda _connection: _settle(opened, None),
            on_open_error_callback=lambda _connection, error: _settle(
                opened, connection_error(error, place, opened=False)
            ),
            on_close_callback=on_close,
            custom_ioloop=loop,
        )
        try:
            error = await asyncio.shield(opened)
        except asyncio.CancelledError:
            # It may have been opened in this very moment: then its end is told by the other of the two.
            ended = closed if opened.done() and opened.result() is None else opened
            with contextlib.suppress(pika.exceptions.ConnectionWrongStateError):
                connection.close()
            await _first(ended, timeout=CLOSE_SECONDS)
            if not ended.done():
                # Whoever runs the loop ends it after this: a broker, or a machine, that is too slow for manners must
                # not leave an open socket behind.
                connection.abort()
                await _first(ended, timeout=1)
            raise
        if error is not None:
            raise error
        connection.widen()
        session = cls(connection, place, closed)
        if isinstance(params.credentials, TokenBearer):
            session._know(params.credentials.token, params.credentials.account(session.version))
        try:
            session._check_version()
        except UnsupportedBroker:
            await session.close()
            raise
        connection.add_on_connection_blocked_callback(session._on_blocked)
        connection.add_on_connection_unblocked_callback(session._on_unblocked)
        return session

    @property
    def product(self) -> str:
        """What the broker calls itself, with its version."""
        facts = self._connection.server_properties or {}
        return f"{facts.get('product', 'a broker')} {facts.get('version', 'of an unknown version')}"

    @property
    def agreed(self) -> tuple[int, int, int]:
        """What both sides have agreed on: channels of one connection, bytes of a frame, seconds of the heartbeat."""
        params = self._connection.params
        return int(params.channel_max), int(params.frame_max), int(params.heartbeat or 0)

    @property
    def tls(self) -> ssl.SSLSocket | None:
        """The line, if it is encrypted."""
        return self._connection.tls

    @property
    def max_message_bytes(self) -> int:
        """What this broker takes if its operator has not changed it."""
        return 16 * 2**20 if self.version >= (4, 0, 0) else 128 * 2**20

    @property
    def has_room(self) -> bool:
        """Whether the next message may be given to pika, or should wait until it has sent some."""
        return self._connection.buffered < BUFFERED_BYTES

    @property
    def received_bytes(self) -> int:
        """How much has come in, to tell a slow message from none."""
        return int(self._connection.bytes_received)

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that went out and came in, also once it is closed."""
        return self._connection.traffic

    async def renew_token(self, token: Token) -> None:
        """Have the broker go by ``token`` from now on.

        Raises the :class:`BrokerError` for which the connection ended instead.
        """
        if self.token is not None and token.account(self.version) != self.token.account(self.version):
            # All that was set up is under the old account's name.
            self.cut()
            return
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            self._connection.update_secret(token.text, "renewed", lambda _frame: _settle(done, None))
        except pika.exceptions.AMQPError as error:
            raise connection_error(error, self.place, opened=True) from None
        await _first(done, self.closed)
        if not done.done():
            raise self.closed.result()
        self._know(token, self.place.user)

    def _know(self, token: Token, account: str) -> None:
        self.token = token
        self.place = replace(self.place, user=account, expires=token.expires)

    def cut(self) -> None:
        """Break the connection without a word, as a network would."""
        self._connection.abort()

    async def channel(self) -> Channel:
        """A new channel. Raises :class:`ConnectionLost`."""
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        try:
            raw = self._connection.channel(on_open_callback=lambda _channel: _settle(opened, None))
        except pika.exceptions.AMQPError as error:
            raise connection_error(error, self.place, opened=True) from None
        channel = Channel(raw, self)
        await channel.reply_of(opened)
        return channel

    async def missing(self, *, queues: tuple[str, ...] = (), exchanges: tuple[str, ...] = ()) -> tuple[str, ...]:
        """Those of these that are not there, as ``queue NAME`` and ``exchange NAME``."""
        return tuple(
            [f"exchange {name}" for name in exchanges if not await self.exists(exchanges=(name,))]
            + [f"queue {name}" for name in queues if not await self.exists(queues=(name,))]
        )

    async def exists(self, *, queues: tuple[str, ...] = (), exchanges: tuple[str, ...] = ()) -> bool:
        """Whether all of these are there."""
        try:
            await self.require(queues=queues, exchanges=exchanges)
        except Unroutable:
            return False
        return True

    async def require(self, *, queues: tuple[str, ...] = (), exchanges: tuple[str, ...] = ()) -> None:
        """Raise :class:`Unroutable` if one of these is not there.

        Asked on a channel of its own, because RabbitMQ closes it if not.
        """
        probe = await self.channel()
        try:
            for name in exchanges:
                await probe.call(
                    "exchange_declare", Operation(f"look at exchange {name!r}", "read"), exchange=name, passive=True
                )
            for name in queues:
                await probe.call(
                    "queue_declare", Operation(f"look at queue {name!r}", "read"), queue=name, passive=True
                )
        finally:
            await probe.close()

    async def close(self) -> None:
        """Close in order; if that is not answered, or cannot be, cut."""
        if self.is_blocked:
            self.cut()
        with contextlib.suppress(pika.exceptions.ConnectionWrongStateError):
            self._connection.close()
        await _first(self.closed, timeout=CLOSE_SECONDS)
        if not self.closed.done():
            self.cut()
            await _first(self.closed, timeout=1)

    def _check_version(self) -> None:
        shown = ".".join(map(str, self.version))
        if (0, 0, 0) < self.version < OLDEST:
            raise UnsupportedBroker(f"{self.place.address} is RabbitMQ {shown}; fedmq needs 3.9 or newer (for streams)")
        if not 3 <= self.version[0] <= NEWEST_TESTED_MAJOR:
            log.warning("%s says its version is %s: fedmq is not tested with it", self.place.address, shown)

    def _on_blocked(self, _connection: object, frame: Any) -> None:
        self.is_blocked = True
        log.warning(
            "RabbitMQ at %s takes no messages for now: %s. It needs memory or disk space; publishing waits",
            self.place.address,
            frame.method.reason,
        )

    def _on_unblocked(self, _connection: object, _frame: Any) -> None:
        self.is_blocked = False
        log.warning("RabbitMQ at %s takes messages again", self.place.address)


class Channel:
    """One channel. ``closed`` holds the reason once it has ended, by whichever side."""

    def __init__(self, raw: RawChannel, session: Session) -> None:
        self.raw = raw
        self.session = session
        self.closed: asyncio.Future[BrokerError] = asyncio.get_running_loop().create_future()
        self._operation = Operation("publish")
        raw.add_on_close_callback(self._on_close)
        raw.add_on_cancel_callback(self._on_cancel)

    async def call(self, method: str, operation: Operation, **arguments: Any) -> Any:
        """Call ``method`` of pika's channel and wait for the reply.

        Raises the :class:`BrokerError` for which the broker closed the channel instead.
        """
        reply: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._operation = operation
        try:
            getattr(self.raw, method)(callback=lambda frame: _settle(reply, frame), **arguments)
        except pika.exceptions.AMQPError as error:
            raise self._reason(error) from None
        result = await self.reply_of(reply)
        self._operation = Operation("publish")
        return result

    def publish(self, exchange: str, key: str, body: bytes, properties: pika.BasicProperties) -> None:
        """Publish without waiting for a confirmation. Raises the :class:`BrokerError` for which the channel ended."""
        try:
            self.raw.basic_publish(exchange, key, body, properties)
        except pika.exceptions.AMQPError as error:
            raise self._reason(error) from None

    def _reason(self, error: pika.exceptions.AMQPError) -> BrokerError:
        """Why the channel has ended, or what ``error`` means if it has not."""
        return self.closed.result() if self.closed.done() else channel_error(error, self.session.place, self._operation)

    def expect(self, operation: Operation) -> None:
        """If the broker closes the channel from here on, ``operation`` is what it refuses."""
        self._operation = operation

    async def declare_exchange(self, name: str, kind: str) -> None:
        """A durable exchange."""
        operation = Operation(f"declare exchange {name!r}", "configure")
        await self.call("exchange_declare", operation, exchange=name, exchange_type=kind, durable=True)

    async def declare_queue(self, name: str, arguments: Mapping[str, str | int | bool]) -> None:
        """A durable queue."""
        operation = Operation(
            f"declare queue {name!r} (and to read it and write to its dead-letter exchange)", "configure"
        )
        await self.call("queue_declare", operation, queue=name, durable=True, arguments=dict(arguments))

    async def count(self, queue: str) -> int:
        """How many messages in ``queue`` are ready."""
        operation = Operation(f"look at queue {queue!r}", "read")
        frame = await self.call("queue_declare", operation, queue=queue, passive=True)
        return int(frame.method.message_count)

    async def delete_queue(self, name: str) -> None:
        """Delete a queue and what is in it."""
        await self.call("queue_delete", Operation(f"delete queue {name!r}", "configure"), queue=name)

    async def declare_own_queue(self, name: str, max_length: int) -> None:
        """A queue that goes with this connection and drops its oldest messages rather than grow."""
        operation = Operation(f"declare queue {name!r}", "configure")
        arguments = {"x-max-length": max_length}
        await self.call(
            "queue_declare", operation, queue=name, exclusive=True, auto_delete=True, durable=False, arguments=arguments
        )

    async def bind(self, queue: str, exchange: str, key: str) -> None:
        """Bind a queue."""
        operation = Operation(f"bind queue {queue!r} (write) to exchange {exchange!r} (read)", "write or read")
        await self.call("queue_bind", operation, queue=queue, exchange=exchange, routing_key=key)

    async def consume(
        self,
        queue: str,
        on_message: OnMessage,
        *,
        tag: str = "",
        prefetch: int = 0,
        arguments: Mapping[str, str | int] | None = None,
    ) -> None:
        """Consume; without ``prefetch`` nothing is to be acknowledged."""
        operation = Operation(f"consume from queue {queue!r}", "read")
        if prefetch:
            # RabbitMQ applies it to each consumer that is started afterwards.
            await self.call("basic_qos", operation, prefetch_count=prefetch)
        await self.call(
            "basic_consume",
            operation,
            queue=queue,
            on_message_callback=lambda _channel, method, properties, body: on_message(method, properties, body),
            auto_ack=not prefetch,
            consumer_tag=tag or None,
            arguments=dict(arguments or {}),
        )

    async def cancel(self, tag: str, *, of_stream: bool = False) -> None:
        """End a consumer. What was on its way to it goes back to its queue, which a stream has no need of."""
        if of_stream:
            drop_late(self.raw, tag)
        await self.call("basic_cancel", Operation("stop consuming", "read"), consumer_tag=tag)

    async def confirm(self, on_confirm: Callable[[Any], None]) -> None:
        """Have each published message confirmed."""
        await self.call("confirm_delivery", Operation("publish"), ack_nack_callback=on_confirm)

    async def reply_of(self, reply: asyncio.Future[Any]) -> Any:
        """The result of ``reply``, or the channel's end as an exception."""
        await _first(reply, self.closed)
        if reply.done():
            return reply.result()
        raise self.closed.result()

    async def wait(self, future: asyncio.Future[Any], timeout: float) -> bool:
        """Whether ``future`` is done after ``timeout`` seconds at the latest; raises the channel's end."""
        await _first(future, self.closed, timeout=timeout)
        if self.closed.done():
            raise self.closed.result()
        return future.done()

    async def ended(self) -> BrokerError:
        """Wait until the channel has ended; the reason."""
        return await asyncio.shield(self.closed)

    def end(self, reason: BrokerError) -> None:
        """Treat the channel as ended, as if the broker had closed it."""
        _settle(self.closed, reason)

    async def close(self) -> bool:
        """Close it, if the broker has not; False if there was no answer."""
        if not self.raw.is_open:
            return True
        if self.session.is_blocked:
            return False
        gone: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.raw.add_on_close_callback(lambda _channel, _reason: _settle(gone, None))
        self.raw.close()
        await _first(gone, self.session.closed, timeout=CLOSE_SECONDS)
        return gone.done()

    def _on_close(self, _channel: object, error: BaseException) -> None:
        if isinstance(error, pika.exceptions.ChannelClosedByClient):
            _settle(self.closed, ConnectionLost("closed"))
        else:
            _settle(self.closed, channel_error(error, self.session.place, self._operation))

    def _on_cancel(self, frame: Any) -> None:
        tag = frame.method.consumer_tag
        self.end(Unroutable(f"the broker ended consumer {tag!r}: its queue was deleted or moved"))


def version_of(text: str) -> tuple[int, int, int]:
    """Major, minor and patch number; zeros if ``text`` holds no version."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return (int(match[1]), int(match[2]), int(match[3] or 0)) if match else (0, 0, 0)


async def _first(*futures: asyncio.Future[Any], timeout: float | None = None) -> None:
    await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED, timeout=timeout)


def _settle(future: asyncio.Future[Any], value: Any) -> None:
    if not future.done():
        future.set_result(value)
