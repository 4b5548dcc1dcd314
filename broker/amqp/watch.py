"""Look on: every event of a run, for displays. Takes nothing away from anybody."""

from __future__ import annotations

import asyncio
import logging
import secrets
from concurrent.futures import Future

import pika

from broker.amqp.connection import Link
from broker.amqp.publisher import plain
from broker.amqp.session import Channel
from broker.errors import BrokerError
from broker.settings import BrokerConfig
from broker.topology import EVENTS, Topology
from broker.transport import Delivery, Failed, Sink, Source

__all__ = ["AmqpWatch"]

log = logging.getLogger("fedmq.broker")

QUEUE_LENGTH = 10_000
RETRY_SECONDS = 0.5


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
