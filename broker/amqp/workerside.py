"""A worker's side of the port over RabbitMQ."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any

import pika

from broker.amqp.download import Download
from broker.amqp.notices import listen
from broker.amqp.session import Channel
from broker.amqp.side import Side, delivery_of
from broker.amqp.upload import Route
from broker.amqp.versions import Reader
from broker.errors import BrokerError, Unroutable
from broker.settings import BrokerConfig
from broker.topology import CONTROL, EVENTS, UPDATES, Topology
from broker.transport import Believe, Delivery, Outgoing, Sink, Source, order_of

__all__ = ["AmqpWorkerTransport"]

log = logging.getLogger("fedmq.broker")

#: How often a worker looks whether its run exists.
RETRY_SECONDS = 1.0


class AmqpWorkerTransport(Side):
    """A worker's side.

    Args:
        config: the table ``[broker]``.
        topology: the run's names.
        worker: the worker's name.
        role: what the admin UI calls it, beside its name.
    """

    def __init__(self, config: BrokerConfig, topology: Topology, *, worker: str, role: str = "worker") -> None:
        route = Route((UPDATES, topology.chunk_key(worker)), (UPDATES, topology.key(worker)), "update")
        super().__init__(config, topology, f"{role} {worker}", route=route)
        self._worker = worker
        self._last = (-1, -1, -1)
        self._offsets: str | int = ""
        self._believe: Believe = lambda _delivery: True
        self._download: Download | None = None
        self._wish = asyncio.Event()

    def open(self, sink: Sink, *, wait: float = 0.0, believe: Believe | None = None) -> None:
        """See the port."""
        self._believe = believe or self._believe
        super().open(sink, wait=wait)

    def publish(self, message: Outgoing) -> Future[None]:
        """See the port."""
        if message.chunks:
            sent = self._uploader.send(message)
            sent.add_done_callback(self._published)
            return sent
        return self._publisher.publish(UPDATES, self._topology.key(self._worker), message, kind="update")

    def _published(self, done: Future[None]) -> None:
        if isinstance(done.exception(), Unroutable):
            self._uploader.forget()  # the outbox is not there: what was in it, if it was, is gone

    def fetch(self, delivery: Delivery, part: range | None = None) -> None:
        """See the port."""
        self._consumer.call(self._fetch, delivery, part)

    def control(self, message: Outgoing) -> Future[None]:
        """See the port. Fails like :meth:`publish`; send it again then."""
        return self._publisher.publish(CONTROL, self._topology.key(self._worker), message, kind="control")

    def event(self, kind: str, message: Outgoing) -> None:
        """See the port."""
        self._publisher.send(EVENTS, self._topology.event_key(kind, self._worker), message, kind=kind)

    # ------------------------------------------------------------------------------- on the links' threads

    async def _prepare(self, channel: Channel) -> None:
        self._publisher.link.mark_up()
        while not await channel.session.exists(exchanges=(UPDATES, CONTROL, EVENTS)):
            # Publishing to a missing exchange would cost the channel each time.
            self._publisher.refuse(self._say_absent())
            await asyncio.sleep(RETRY_SECONDS)

    async def _consume(self, channel: Channel) -> None:
        self._consumer.mark_up()
        self._stand()
        stream = self._topology.parameters
        while not await channel.session.exists(exchanges=(EVENTS,), queues=(stream,)):
            self._say_absent()
            await asyncio.sleep(RETRY_SECONDS)

        def on_notice(_method: object, properties: pika.BasicProperties, body: bytes) -> None:
            if self._believe(notice := delivery_of(Source.EVENT, body, properties)):
                self._hand(notice)

        notices = listen(channel, self._topology.notices(self._worker), on_notice, tag=f"{self._worker}-notices")
        beside = [_beside(notices)]
        try:
            versions = Reader(channel, stream, f"{self._worker}-parameters", self._take)
            await versions.begin()
            beside.append(_beside(versions.keep_up()))
            await self._download_on(channel)
        finally:
            for task in beside:
                task.cancel()

    def _fetch(self, delivery: Delivery, part: range | None) -> None:
        self._download = Download(delivery, part, self._hand)
        self._wish.set()

    async def _download_on(self, channel: Channel) -> None:
        """Download what is asked for, until the channel ends, which is raised."""
        while True:
            self._wish.clear()
            tasks: list[asyncio.Task[Any]] = [asyncio.ensure_future(self._wish.wait())]
            if self._download is not None and not self._download.is_over:
                tasks.append(asyncio.ensure_future(self._download.run(channel, self._topology.chunks)))
            try:
                await asyncio.wait({*tasks, channel.closed}, return_when=asyncio.FIRST_COMPLETED)
                if channel.closed.done():
                    raise channel.closed.result()
                for task in tasks:
                    if task.done():
                        task.result()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def _take(self, properties: pika.BasicProperties, body: bytes) -> None:
        # A stream begins to read at its last block, which may hold several versions, and after a reconnect
        # it begins there again.
        delivery = delivery_of(Source.PARAMETERS, body, properties)
        order, offsets = order_of(delivery.headers), delivery.headers.get("offsets", "")
        # The same version in other places: the stream of chunks was deleted and made again.
        is_news = order > self._last or (order == self._last and offsets != self._offsets)
        if is_news and self._believe(delivery):
            self._last, self._offsets = order, offsets
            self._hand(delivery)

    def _say_absent(self) -> Unroutable:
        run = self._topology.run
        text = f"no aggregator has declared run {run!r} yet"
        if self._last > (-1, -1, -1):
            text = f"what run {run!r} needs on the broker was deleted, and no aggregator has declared it again yet"
        if self._seldom.may(text):
            log.info("%s; waiting for it", text)
        return Unroutable(text)


def _beside(deed: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
    """Do it until the channel ends, which is seen elsewhere."""

    async def run() -> None:
        with contextlib.suppress(BrokerError):
            await deed

    return asyncio.get_running_loop().create_task(run())
