"""Consumers of streams that end while messages are on their way to them."""

from __future__ import annotations

import asyncio
import secrets

import pika
import pytest

from broker.amqp.credentials import parameters
from broker.amqp.node import PrivateNode
from broker.amqp.session import Channel, Session
from tests.support.node import config_of

pytestmark = pytest.mark.broker

MESSAGES = 300
PATIENCE = 60.0


async def read(channel: Channel, stream: str, until: int) -> None:
    """Consume from the first message on, and cancel as soon as so many have come, whatever is still on its way."""
    enough: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    count = 0

    def on_message(method: pika.spec.Basic.Deliver, _properties: object, _body: bytes) -> None:
        nonlocal count
        count += 1
        channel.raw.basic_ack(method.delivery_tag)
        if count >= until and not enough.done():
            enough.set_result(None)

    await channel.consume(stream, on_message, tag="reader", prefetch=200, arguments={"x-stream-offset": "first"})
    assert await channel.wait(enough, PATIENCE)
    await channel.cancel("reader", of_stream=True)


async def survives(node: PrivateNode) -> None:
    session = await Session.connect(parameters(config_of(node), "test")[0])
    channel = await session.channel()
    stream = f"stream-{secrets.token_hex(4)}"
    await channel.declare_queue(stream, {"x-queue-type": "stream"})
    for _ in range(MESSAGES):
        channel.raw.basic_publish("", stream, bytes(10_000))
    await read(channel, stream, 1)
    await read(channel, stream, MESSAGES)
    assert not session.closed.done()
    await session.close()


def test_a_connection_survives_the_end_of_a_consumer_to_which_messages_are_on_their_way(node: PrivateNode) -> None:
    asyncio.run(survives(node))
