"""The stream of versions: which of its messages is the newest."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Mapping

import pika

from broker.amqp.publisher import plain
from broker.amqp.session import Channel
from broker.transport import Believe, Delivery, Source, order_of

__all__ = ["Lag", "Reader", "newest_broadcast", "newest_headers"]

#: A stream that is not empty begins to answer far sooner; of one that is, nothing is ever heard.
QUIET_SECONDS = 1.0
#: Less than this within QUIET_SECONDS are heartbeats and replies, not a message on its way over a slow line.
SILENCE_BYTES = 4096
PREFETCH = 100
#: Acknowledgements of a stream are credit: two versions on their way keep the connection busy.
READ_PREFETCH = 2
#: Whoever reads so far behind what is written reads on at the last message. More than the second to which times of
#: writing are rounded, and than a version takes on any line over which it could be of use.
LAG_SECONDS = 5.0


async def newest_broadcast(
    channel: Channel, stream: str, *, patience: float = math.inf, believe: Believe = lambda _delivery: True
) -> tuple[int, int] | None:
    """Epoch and version of the newest message in ``stream``; None if there is none. ``patience`` as below."""
    headers = await newest_headers(channel, stream, patience=patience, believe=believe)
    return None if headers is None else order_of(headers)[:2]


async def newest_headers(
    channel: Channel, stream: str, *, patience: float = math.inf, believe: Believe = lambda _delivery: True
) -> Mapping[str, str | int] | None:
    """Headers of the newest message in ``stream``; None if there is none.

    The last block of a stream may hold several, so all that come at once are looked at. On a channel of its
    own: acknowledgements of a stream are credit, and what is left over ends with it.

    Of a run that goes on there may always be one more: once something has come, whoever only looks is content with the
    newest that comes within ``patience`` seconds. An aggregator that begins is not. What ``believe`` does not take is
    passed over.
    """
    probe = await channel.session.channel()
    newest: Mapping[str, str | int] | None = None
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_message(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
        nonlocal newest
        headers = plain(properties.headers)
        is_newest = newest is None or order_of(headers) >= order_of(newest)
        if is_newest and believe(Delivery(source=Source.PARAMETERS, body=body, headers=headers)):
            newest = headers
        probe.raw.basic_ack(method.delivery_tag)

    try:
        await probe.consume(stream, on_message, prefetch=PREFETCH, arguments={"x-stream-offset": "last"})
        heard = -SILENCE_BYTES
        begun = time.monotonic()
        while probe.session.received_bytes - heard >= SILENCE_BYTES:
            if newest is not None and time.monotonic() - begun >= patience:
                break
            heard = probe.session.received_bytes
            await probe.wait(never, QUIET_SECONDS if newest is None else QUIET_SECONDS / 4)
    finally:
        await probe.close()
    return newest


class Lag:
    """By how much what is read falls behind what is written.

    Clocks of two machines may differ, so an age alone says nothing; but the age of the youngest message so far is what
    a message has that comes without delay, and whatever is older than that by much has waited on its way.
    """

    def __init__(self) -> None:
        self._least: float | None = None

    def add(self, written: int | None, now: float) -> float:
        """The lag of a message that was ``written`` then, by the writer's clock; 0 if that is not known."""
        if written is None:
            return 0.0
        age = now - written
        self._least = age if self._least is None else min(self._least, age)
        return age - self._least


class Reader:
    """Reads a stream of versions, and passes some over if they come faster than the line takes them.

    A stream gives its messages one after the other. Over a slow line, or one on which chunks are under way, that would
    be ever older ones, whose chunks are gone. So whoever is behind by a few seconds begins anew at the last.
    """

    def __init__(
        self, channel: Channel, stream: str, tag: str, take: Callable[[pika.BasicProperties, bytes], None]
    ) -> None:
        self._channel, self._stream, self._tag, self._take = channel, stream, tag, take
        self._arrived = False
        self._lag = Lag()
        self._is_behind = asyncio.Event()

    async def begin(self) -> None:
        """Hand over the messages from the last block on. Returns once the first has come."""
        never: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        while not self._arrived:
            await self._consume()
            # Who asks for the last message while the first is being written gets none: RabbitMQ finds the
            # stream empty, and then begins behind that message. So ask again unless something comes.
            heard = -SILENCE_BYTES
            while not self._arrived and self._channel.session.received_bytes - heard >= SILENCE_BYTES:
                heard = self._channel.session.received_bytes
                await self._channel.wait(never, QUIET_SECONDS)
            if not self._arrived:
                await self._channel.cancel(self._tag, of_stream=True)

    async def keep_up(self) -> None:
        """Begin anew whenever it is too far behind, until the channel ends, which is raised."""
        while True:
            await self._is_behind.wait()
            await self._channel.cancel(self._tag, of_stream=True)
            self._lag = Lag()
            self._is_behind.clear()
            await self._consume()

    async def _consume(self) -> None:
        arguments: dict[str, str | int] = {"x-stream-offset": "last"}
        await self._channel.consume(
            self._stream, self._on_version, tag=self._tag, prefetch=READ_PREFETCH, arguments=arguments
        )

    def _on_version(self, method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
        self._arrived = True
        self._channel.raw.basic_ack(method.delivery_tag)
        if self._lag.add(properties.timestamp, time.time()) > LAG_SECONDS:
            self._is_behind.set()
        self._take(properties, body)
