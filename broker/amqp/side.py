"""What both sides of the port have in common: two connections, a sink, generations."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from typing import Any

import pika

from broker.amqp.connection import Link
from broker.amqp.publisher import Publisher, plain
from broker.amqp.session import Channel
from broker.amqp.upload import Route, Tail, Uploader
from broker.errors import BrokerError, BrokerUnreachable
from broker.seldom import Seldom
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Connected, Delivery, Disconnected, Failed, Incoming, LinkState, Sink, Source

__all__ = ["OWN_QUEUE_LENGTH", "Side", "delivery_of"]

#: How long ``close`` waits for confirmations of what is on its way.
FLUSH_SECONDS = 2.0
#: Messages in a queue that goes with its connection.
OWN_QUEUE_LENGTH = 10_000


class Side:
    """A transport without what it publishes and consumes."""

    def __init__(self, config: BrokerConfig, topology: Topology, who: str, *, route: Route, stream: str = "") -> None:
        """With ``stream``, chunks go into that stream, whose exchange has the same name."""
        self._topology = topology
        name = f"fedmq {who} · run {topology.run}"
        self._seldom = seldom = Seldom()
        self._publisher = Publisher(
            config, f"{name} · publish", prepare=self._prepare, failed=self._fail, seldom=seldom
        )
        self._consumer = Link(
            config, f"{name} · consume", use=self._consume, down=self._down, failed=self._fail, seldom=seldom
        )
        # What the one finds, the other need not wait for.
        self._consumer.connected = self._publisher.link.hurry
        self._publisher.link.connected = self._consumer.hurry
        tail = Tail(self._publisher, stream, stream) if stream else None
        self._uploader = Uploader(self._publisher, route, tail=tail)
        self._sink: Sink | None = None
        self._generation = 0
        self._connected = False
        self._opened = False
        self._dead_letters = 0
        self._failure: BrokerError | None = None
        self._lock = threading.RLock()  # a sink may close the transport

    def open(self, sink: Sink, *, wait: float = 0.0) -> None:
        """See the port."""
        self._sink = sink
        self._opened = not wait
        self._publisher.start()
        self._consumer.start()
        if wait:
            self._await_links(wait)

    def _await_links(self, wait: float) -> None:
        deadline = time.monotonic() + wait
        try:
            for link in (self._consumer, self._publisher.link):
                link.up.result(max(0.0, deadline - time.monotonic()))
            self._opened = True
        except TimeoutError:
            problem = self._consumer.problem or self._publisher.link.problem or "no answer"
            raise BrokerUnreachable(f"no connection to RabbitMQ within {wait} s: {problem}") from None
        except BrokerError as error:
            # If one link failed, the other was closed because of it and only says that.
            raise self._failure or error from None
        finally:
            if not self._opened:
                self.close()

    @property
    def max_message_bytes(self) -> int:
        """See the port."""
        return self._publisher.max_message_bytes

    @property
    def account(self) -> str:
        """See the port."""
        return self._consumer.account

    def state(self) -> LinkState:
        """How it stands with the broker. May be asked at any time, from any thread."""
        links = [link.traffic for link in (self._publisher.link, self._consumer)]
        sent, received = (sum(amounts) for amounts in zip(*(link.bytes for link in links), strict=True))
        return LinkState(
            connected=all(link.is_up for link in links),
            blocked=any(link.is_blocked for link in links),
            reconnects=sum(link.reconnects for link in links),
            sent_bytes=sent,
            received_bytes=received,
            dead_letters=self._dead_letters,
        )

    def close(self) -> None:
        """See the port."""
        self._publisher.flush(FLUSH_SECONDS)
        self._uploader.close()
        with self._lock:
            self._sink = None
        self._consumer.stop(0)
        self._publisher.stop()
        self._consumer.stop()

    def drop(self) -> None:
        """Cut both connections, as a network would; they are made again. For tests."""
        self._consumer.drop()
        self._publisher.link.drop()

    async def _prepare(self, channel: Channel) -> None:
        raise NotImplementedError

    async def _consume(self, channel: Channel) -> None:
        raise NotImplementedError

    def _hand(self, item: Incoming) -> None:
        with self._lock:
            if self._sink is not None:
                self._sink(item)

    def _stand(self, newest: tuple[int, int] | None = None) -> int:
        """A new generation; call it before the first delivery can come."""
        self._generation += 1
        self._connected = True
        self._hand(Connected(self._generation, newest))
        return self._generation

    def _down(self, reason: BrokerError) -> None:
        if self._connected:
            self._connected = False
            self._hand(Disconnected(self._generation, str(reason)))

    def _fail(self, error: BrokerError) -> None:
        # Either link may fail, on its own thread; the other has no use without it.
        with self._lock:
            # Under one lock: both may be refused at the same moment, and the sink is told once.
            self._failure = self._failure or error
            if self._opened:
                self._hand(Failed(error))
            self._sink = None
        self._consumer.stop(0)
        self._publisher.give_up(error)


def delivery_of(source: Source, body: bytes, properties: pika.BasicProperties, **more: Any) -> Delivery:
    """A message as the port hands it over; the broker's ``message_id`` becomes a header."""
    user = properties.user_id or ""
    delivery = Delivery(source=source, body=body, headers=plain(properties.headers), user=user, **more)
    if properties.message_id:
        delivery = replace(delivery, headers={**delivery.headers, "message_id": properties.message_id})
    return delivery
