"""What the aggregator tells one worker: a queue for each, which the aggregator declares.

Not the worker, which therefore needs no right to configure anything. RabbitMQ knows one such right for exchanges and
queues alike, and whoever has an exchange of its own that hands on to another (as its alternate, or by a binding), or a
queue that dead-letters there, writes under keys that its permissions on topics forbid.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable

from broker.amqp.session import Channel, OnMessage
from broker.errors import BrokerError
from broker.seldom import Seldom
from broker.topology import Topology
from broker.transport import Outgoing

__all__ = ["Notices", "listen"]

log = logging.getLogger("fedmq.broker")

#: After so long a queue is declared once more before it is written to: it may be gone, or its binding.
AGAIN_SECONDS = 30.0
#: Notices that wait, beyond which they get lost.
MOST_WAITING = 10_000
#: Between two looks of a worker whether its queue is there; each that finds nothing is a line in the broker's log.
PAUSE, LONGEST_PAUSE = 0.2, 30.0


class Notices:
    """The aggregator's end. Used on the consumer link's thread only.

    Args:
        topology: the run's names.
        send: publishes a notice to a worker.
    """

    def __init__(self, topology: Topology, send: Callable[[str, Outgoing], None]) -> None:
        self._topology = topology
        self._send = send
        self._to_do: asyncio.Queue[tuple[str, Outgoing | None]] = asyncio.Queue(MOST_WAITING)
        self._declared: dict[str, float] = {}
        self._work: asyncio.Task[None] | None = None
        self._seldom = Seldom()

    def start(self, channel: Channel) -> None:
        """A new generation begins."""
        self._to_do = asyncio.Queue(MOST_WAITING)
        self._work = asyncio.get_running_loop().create_task(self._live(channel))

    def stop(self) -> None:
        """The generation is over."""
        if self._work is not None:
            self._work.cancel()
            self._work = None
        self._declared.clear()

    def welcome(self, worker: str) -> None:
        """Make what ``worker`` listens to."""
        self._put(worker, None)

    def tell(self, worker: str, message: Outgoing) -> None:
        """Send ``message`` to ``worker``. Lossy."""
        if self._work is None:
            self._send(worker, message)
        else:
            self._put(worker, message)

    def _put(self, worker: str, message: Outgoing | None) -> None:
        with contextlib.suppress(asyncio.QueueFull):
            self._to_do.put_nowait((worker, message))

    async def _live(self, main: Channel) -> None:
        # On a channel of its own, which alone is lost if somebody has declared such a queue otherwise.
        channel: Channel | None = None
        clock = asyncio.get_running_loop().time
        try:
            while True:
                worker, message = await self._to_do.get()
                if message is None or clock() - self._declared.get(worker, -math.inf) >= AGAIN_SECONDS:
                    try:
                        if channel is None or not channel.raw.is_open:
                            channel = await main.session.channel()
                        await _declare(channel, self._topology, worker)
                        self._declared[worker] = clock()
                    except BrokerError as error:
                        if main.closed.done():
                            return
                        if self._seldom.may("notices"):
                            log.warning("worker %s hears nothing of what is told to it: %s", worker, error)
                if message is not None:
                    self._send(worker, message)
        finally:
            if channel is not None and channel.raw.is_open:
                channel.raw.close()


async def _declare(channel: Channel, topology: Topology, worker: str) -> None:
    queue = topology.notices_queue(worker)
    await channel.declare_queue(queue.name, {"x-queue-type": queue.type, **queue.arguments})
    for key in queue.bindings:
        await channel.bind(queue.name, queue.exchange, key)


async def listen(channel: Channel, queue: str, on_message: OnMessage, *, tag: str) -> None:
    """Consume from a worker's queue as soon as the aggregator has made it. Raises the channel's end."""
    pause = PAUSE
    while not await channel.session.exists(queues=(queue,)):
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_PAUSE)
    await channel.consume(queue, on_message, tag=tag)
