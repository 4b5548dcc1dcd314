"""The stream of versions: which of its messages is the newest."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pika

from broker.amqp.publisher import plain
from broker.amqp.session import Channel

__all__ = ["newest_broadcast", "order_of", "read_versions"]

#: A stream that is not empty begins to answer far sooner; of one that is, nothing is ever heard.
QUIET_SECONDS = 1.0
#: Less than this within QUIET_SECONDS are heartbeats and replies, not a message on its way over a slow line.
SILENCE_BYTES = 4096
PREFETCH = 100
#: Acknowledgements of a stream are credit: two versions on their way keep the connection busy.
READ_PREFETCH = 2


def order_of(properties: pika.BasicProperties) -> tuple[int, int, int]:
    """Epoch, version and attempt, by which the newer of two is told."""
    headers = plain(properties.headers)
    epoch, version, attempt = (headers.get(name, 0) for name in ("epoch", "version", "attempt"))
    return tuple(value if isinstance(value, int) else 0 for value in (epoch, version, attempt))  # type: ignore[return-value]


async def newest_broadcast(channel: Channel, stream: str) -> tuple[int, int] | None:
    """Epoch and version of the newest message in ``stream``; None if there is none.

    The last block of a stream may hold several, so all that come at once are looked at. On a channel of its
    own: acknowledgements of a stream are credit, and what is left over ends with it.
    """
    probe = await channel.session.channel()
    newest: tuple[int, int] | None = None
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_message(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, _body: bytes) -> None:
        nonlocal newest
        epoch, version, _ = order_of(properties)
        newest = max(newest or (0, 0), (epoch, version))
        probe.raw.basic_ack(method.delivery_tag)

    try:
        await probe.consume(stream, on_message, prefetch=PREFETCH, arguments={"x-stream-offset": "last"})
        heard = -SILENCE_BYTES
        while probe.session.received_bytes - heard >= SILENCE_BYTES:
            heard = probe.session.received_bytes
            await probe.wait(never, QUIET_SECONDS if newest is None else QUIET_SECONDS / 4)
    finally:
        await probe.close()
    return newest


async def read_versions(
    channel: Channel, stream: str, tag: str, take: Callable[[pika.BasicProperties, bytes], None]
) -> None:
    """Hand over the messages of ``stream``, from its last block on. Returns once the first has come."""
    arrived = False
    never: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_parameters(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
        nonlocal arrived
        arrived = True
        channel.raw.basic_ack(method.delivery_tag)
        take(properties, body)

    while not arrived:
        arguments: dict[str, str | int] = {"x-stream-offset": "last"}
        await channel.consume(stream, on_parameters, tag=tag, prefetch=READ_PREFETCH, arguments=arguments)
        # Who asks for the last message while the first is being written gets none: RabbitMQ finds the
        # stream empty, and then begins behind that message. So ask again unless something comes.
        heard = -SILENCE_BYTES
        while not arrived and channel.session.received_bytes - heard >= SILENCE_BYTES:
            heard = channel.session.received_bytes
            await channel.wait(never, QUIET_SECONDS)
        if not arrived:
            await channel.cancel(tag)
