"""The newest version in a stream to which versions come without a pause."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pika

from broker.amqp.session import Channel
from broker.amqp.versions import newest_broadcast


class Endless:
    """A channel on which each wait brings one more version."""

    def __init__(self, seconds: float) -> None:
        self.session = SimpleNamespace(received_bytes=0, channel=self.channel)
        self.raw = SimpleNamespace(basic_ack=lambda _tag: None)
        self.version = 0
        self._seconds = seconds

    async def channel(self) -> Endless:
        return self

    async def consume(self, _stream: str, take: Any, **_rest: object) -> None:
        self._take = take

    async def wait(self, _future: object, _timeout: float) -> bool:
        await asyncio.sleep(self._seconds)
        self.version += 1
        self.session.received_bytes += 40_000
        headers = {"epoch": 1, "version": self.version}
        self._take(SimpleNamespace(delivery_tag=self.version), pika.BasicProperties(headers=headers), b"")
        return False

    async def close(self) -> None:
        pass


def test_who_looks_at_a_fast_run_does_not_wait_for_its_end() -> None:
    channel = Endless(0.01)
    looking = newest_broadcast(cast("Channel", channel), "fedmq.r.parameters", patience=0.05)
    assert asyncio.run(asyncio.wait_for(looking, 60)) == (1, channel.version)


def test_who_has_no_patience_is_told_the_first_all_the_same() -> None:
    channel = Endless(0.01)
    looking = newest_broadcast(cast("Channel", channel), "fedmq.r.parameters", patience=0.0)
    assert asyncio.run(asyncio.wait_for(looking, 60)) == (1, 1)
