"""Transports over RabbitMQ, opened by a test and closed after it."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future

from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Outgoing
from tests.support.waiting import PATIENCE, Inbox, wait_for

__all__ = ["Ends", "confirmed", "version"]


class Ends:
    """Opens transports and closes them after the test."""

    def __init__(self) -> None:
        self._open: list[AmqpAggregatorTransport | AmqpWorkerTransport] = []

    def aggregator(
        self, config: BrokerConfig, topology: Topology, *, model_bytes: int = 1000, prefetch: int = 1000
    ) -> tuple[AmqpAggregatorTransport, Inbox]:
        end = AmqpAggregatorTransport(config, topology, model_bytes=model_bytes, prefetch=prefetch)
        self._open.append(end)
        inbox = Inbox()
        end.open(inbox, wait=PATIENCE)
        return end, inbox

    def worker(self, config: BrokerConfig, topology: Topology, name: str = "w1") -> tuple[AmqpWorkerTransport, Inbox]:
        end = AmqpWorkerTransport(config, topology, worker=name)
        self._open.append(end)
        inbox = Inbox()
        end.open(inbox, wait=PATIENCE)
        return end, inbox

    def close(self) -> None:
        for end in self._open:
            end.close()


def version(number: int) -> Outgoing:
    return Outgoing(body=f"v{number}".encode(), headers={"epoch": 1, "version": number, "attempt": 0})


def confirmed(publish: Callable[[Outgoing], Future[None]], message: Outgoing) -> None:
    """Publish as a worker does: until it is confirmed."""
    wait_for(lambda: publish(message).exception(PATIENCE) is None, what="a confirmed publish")
