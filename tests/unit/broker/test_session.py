"""What a channel says when the connection has ended under it."""

from __future__ import annotations

import asyncio
from typing import Any

import pika
import pika.exceptions
import pytest

from broker.amqp.refusals import Place
from broker.amqp.session import Channel, Session
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


class Half:
    """pika's connection; what a broker would answer is up to the test."""

    made: list[Half] = []  # noqa: RUF012

    def __init__(self, _params: object, **callbacks: Any) -> None:
        self.callbacks = callbacks
        self.events: list[str] = []
        Half.made.append(self)
        asyncio.get_running_loop().call_soon(callbacks["on_open_callback"], self)

    def close(self) -> None:
        self.events.append("close")

    def abort(self) -> None:
        self.events.append("abort")

        def lost() -> None:
            self.events.append("lost")
            self.callbacks["on_close_callback"](self, pika.exceptions.StreamLostError("cut"))

        asyncio.get_running_loop().call_soon(lost)


def test_one_who_gives_up_in_the_moment_of_success_waits_for_the_end_and_leaves_no_socket(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("broker.amqp.session.Connection", Half)
    monkeypatch.setattr("broker.amqp.session.CLOSE_SECONDS", 0.01)

    async def main() -> None:
        attempt = asyncio.ensure_future(Session.connect(pika.ConnectionParameters("somewhere")))
        await asyncio.sleep(0)
        while not Half.made:
            await asyncio.sleep(0)
        await asyncio.sleep(0)  # it is open, and nobody has heard of it yet
        attempt.cancel()
        with pytest.raises(asyncio.CancelledError):
            await attempt

    asyncio.run(main())
    (connection,) = Half.made
    assert connection.events == ["close", "abort", "lost"]
