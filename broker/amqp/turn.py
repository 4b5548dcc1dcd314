"""Which of a run's aggregators is the active one.

A queue with a single active consumer holds one message, the turn. Who was given it, unacknowledged, is active;
when its connection ends, or the broker gives it up for silent, the broker gives the message to the next. So a
takeover takes no polling, and the admin UI shows who leads and who stands by.

Every aggregator puts a turn into the queue when it begins, in case there is none; of several the active one
keeps the newest. It also does so every few minutes, since RabbitMQ closes a channel (after 30 minutes, by
default) on which something has not been acknowledged.

This is no fence: an aggregator that hangs may wake up and not know yet. The checkpoint's epoch is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from concurrent.futures import Future

import pika

from broker.amqp.publisher import Publisher
from broker.amqp.session import Channel
from broker.topology import CONTROL, Topology
from broker.transport import Outgoing

__all__ = ["Turn"]

#: How long to wait for the turn before saying that somebody else has it, and before it is offered again if the
#: broker could not take it.
LOOK_SECONDS = 1.0
RENEW_SECONDS = 300.0
#: How often the active aggregator looks whether what the run needs is still there.
CHECK_SECONDS = 5.0
PREFETCH = 100


class Turn:
    """Waits for the turn on each new channel, and keeps it."""

    def __init__(self, topology: Topology, publisher: Publisher, standby: Callable[[], None]) -> None:
        """``standby`` is called, once for each channel, if another aggregator has the turn."""
        self._topology = topology
        self._publisher = publisher
        self._standby = standby
        self._offer: Future[None] | None = None
        self._offered_at = 0.0

    async def take(self, channel: Channel, tag: str) -> None:
        """Return when this aggregator is the active one. Raises the channel's end."""
        mine: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        held: list[int] = []

        def on_turn(method: pika.spec.Basic.Deliver, _properties: object, _body: bytes) -> None:
            held.append(method.delivery_tag)
            if len(held) > 1:
                channel.raw.basic_ack(held.pop(0))
            if not mine.done():
                mine.set_result(None)

        await channel.consume(self._topology.turn, on_turn, tag=f"{tag}-turn", prefetch=PREFETCH)
        self._put()
        said = False
        while not await channel.wait(mine, LOOK_SECONDS):
            if self._offer is None or not self._offer.done():
                continue
            if self._offer.exception() is not None:
                self._put()
            elif not said:
                said = True
                self._standby()

    async def keep(self, channel: Channel, check: Callable[[], Awaitable[None]]) -> None:
        """Put a new turn into the queue from time to time, until the channel ends; and ``check`` more often.

        Raises the channel's end, or what ``check`` raises.
        """
        loop = asyncio.get_running_loop()
        never: asyncio.Future[None] = loop.create_future()
        while not await channel.wait(never, CHECK_SECONDS):
            await check()
            if loop.time() - self._offered_at > RENEW_SECONDS:
                self._put()

    def _put(self) -> None:
        self._offered_at = asyncio.get_running_loop().time()
        self._offer = self._publisher.publish(CONTROL, self._topology.turn_key, Outgoing(body=b""), kind="turn")
