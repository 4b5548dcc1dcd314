"""What a channel says when the connection has ended under it."""

from __future__ import annotations

import asyncio
from typing import Any

import pika
import pika.exceptions

from broker.amqp.refusals import Place
from broker.amqp.session import Channel
from broker.errors import AccessRefused, BrokerError, ConnectionLost


class DeadRaw:
    """pika's channel after the transport has gone: each call is refused at once."""

    def add_on_close_callback(self, _callback: object) -> None: ...

    def add_on_cancel_callback(self, _callback: object) -> None: ...

    def basic_publish(self, *_arguments: object) -> None:
        raise pika.exceptions.ChannelWrongStateError("Channel is closed.")


def publish_on_a_dead_channel(reason: BrokerError | None) -> BrokerError | None:
    async def main() -> BrokerError | None:
        session = type("Session", (), {"place": Place("host:5672", "/", "u")})
        raw: Any = DeadRaw()
        channel = Channel(raw, session)  # type: ignore[arg-type]
        if reason is not None:
            channel.end(reason)
        try:
            channel.publish("x", "", b"", pika.BasicProperties())
        except BrokerError as error:
            return error
        return None

    return asyncio.run(main())


def test_publishing_after_the_connection_has_gone_is_a_lost_connection_and_no_fault_of_pikas() -> None:
    assert isinstance(publish_on_a_dead_channel(None), ConnectionLost)


def test_the_reason_for_which_the_broker_closed_the_channel_comes_first() -> None:
    refused = AccessRefused("no")
    assert publish_on_a_dead_channel(refused) is refused
