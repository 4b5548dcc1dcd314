"""Look on: every event of a run, and how full its queues are. Takes nothing away from anybody."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass

import pika

from broker.amqp.connection import Link
from broker.amqp.publisher import plain
from broker.amqp.refusals import Operation
from broker.amqp.session import Channel
from broker.amqp.versions import newest_headers
from broker.errors import BrokerError, Unroutable
from broker.settings import BrokerConfig
from broker.topology import EVENTS, Topology
from broker.transport import Delivery, Failed, Sink, Source

__all__ = ["AmqpWatch", "Depth", "depths"]

log = logging.getLogger("fedmq.broker")

QUEUE_LENGTH = 10_000
RETRY_SECONDS = 0.5
#: For the newest version of a run that makes them without a pause.
PATIENCE = 3.0


@dataclass(frozen=True, slots=True)
class Depth:
    """What a broker says of a queue to anybody."""

    ready: int
    consumers: int


async def depths(channel: Channel, queues: tuple[str, ...]) -> dict[str, Depth | None]:
    """How full ``queues`` are, asked beside ``channel``: RabbitMQ closes a channel on which one is not there."""
    found: dict[str, Depth | None] = {}
    probe = await channel.session.channel()
    try:
        for name in queues:
            operation = Operation(f"look at queue {name!r}", "read")
            try:
                frame = await probe.call("queue_declare", operation, queue=name, passive=True)
                found[name] = Depth(int(frame.method.message_count), int(frame.method.consumer_count))
            except Unroutable:
                found[name] = None
                probe = await channel.session.channel()
    finally:
        await probe.close()
    return found


class AmqpWatch:
    """Hands every event of a run to a sink, from the moment on at which the run exists.

    Among the headers of each is its routing key, as ``key``: a broker that is set up so lets nobody publish under
    another's, whatever the body says.
    """

    def __init__(self, config: BrokerConfig, topology: Topology) -> None:
        """Nothing happens before :meth:`open`."""
        self._topology = topology
        name = f"fedmq watch · run {topology.run}"
        self._link = Link(config, name, use=self._use, down=self._down, failed=self._failed)
        self._sink: Sink = lambda _item: None
        #: Done when events are watched for the first time.
        self.watching: Future[None] = Future()

    @property
    def up(self) -> Future[None]:
        """Done when a connection stands for the first time; fails with what made connecting pointless."""
        return self._link.up

    @property
    def problem(self) -> str:
        """Why no connection could be made last; empty if none has failed."""
        return self._link.problem

    def look(self, queues: tuple[str, ...]) -> Future[dict[str, Depth | None]]:
        """How full these queues and streams are; None for those that are not there.

        The future fails with :class:`ConnectionLost` where no connection stands, or with what the broker refuses.
        """
        return self._link.submit(lambda channel: depths(channel, queues))

    def newest(self) -> Future[Mapping[str, str | int] | None]:
        """Headers of the newest version in the run's stream; None if there is none. Takes a second.

        The future fails as :meth:`look`'s, and with :class:`Unroutable` if there is no stream.
        """
        return self._link.submit(lambda channel: newest_headers(channel, self._topology.parameters, patience=PATIENCE))

    def open(self, sink: Sink) -> None:
        """Start watching; returns at once. ``sink`` is called on the connection's thread."""
        self._sink = sink
        self._link.start()

    def close(self) -> None:
        """Stop watching."""
        self._link.stop()

    async def _use(self, channel: Channel) -> None:
        self._link.mark_up()
        while not await channel.session.exists(exchanges=(EVENTS,)):
            await asyncio.sleep(RETRY_SECONDS)
        queue = self._topology.own_queue("watch", secrets.token_hex(4))
        await channel.declare_own_queue(queue, QUEUE_LENGTH)
        await channel.bind(queue, EVENTS, f"{self._topology.run}.#")

        def on_event(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
            headers = {**plain(properties.headers), "key": method.routing_key}
            self._sink(Delivery(source=Source.EVENT, body=body, headers=headers))

        await channel.consume(queue, on_event, tag="watch")
        if not self.watching.done():
            self.watching.set_result(None)

    def _down(self, _reason: BrokerError) -> None:
        log.debug("watching paused until the connection stands again")

    def _failed(self, error: BrokerError) -> None:
        self._sink(Failed(error))
