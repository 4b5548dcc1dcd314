"""The two brokers that the contract holds for, behind one face."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Protocol

from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.memory import MemoryBroker
from broker.topology import Topology
from broker.transport import AggregatorTransport, WorkerTransport
from tests.support.node import config_of, drain, ready
from tests.support.waiting import Inbox

MAX_MESSAGE_BYTES = 65536


class Droppable(Protocol):
    """An end whose connection can be cut."""

    def drop(self) -> None:
        """Cut it; it is made again."""


class AggregatorEnd(AggregatorTransport, Droppable, Protocol):
    """An aggregator's transport under test."""


class WorkerEnd(WorkerTransport, Droppable, Protocol):
    """A worker's transport under test."""


@dataclass(frozen=True)
class Dead:
    """A rejected update as an operator finds it."""

    body: bytes
    message_id: str
    reason: str
    detail: str


class Backend(Protocol):
    """A broker with one run."""

    run: str

    def aggregator(self, *, prefetch: int = 64) -> AggregatorEnd:
        """A new transport, not yet open."""

    def worker(self, name: str) -> WorkerEnd:
        """A new transport, not yet open."""

    def waiting(self) -> int:
        """Updates that wait and are in nobody's hands."""

    def dead(self) -> list[Dead]:
        """The rejected updates; they are taken out."""

    def close(self) -> None:
        """Close all transports."""


@dataclass
class MemoryBackend:
    """The in-process broker."""

    run: str = field(default_factory=lambda: f"run-{secrets.token_hex(4)}")
    broker: MemoryBroker = field(default_factory=lambda: MemoryBroker(max_message_bytes=MAX_MESSAGE_BYTES))

    def aggregator(self, *, prefetch: int = 64) -> AggregatorEnd:
        return self.broker.aggregator(self.run, prefetch=prefetch)

    def worker(self, name: str) -> WorkerEnd:
        return self.broker.worker(self.run, name)

    def waiting(self) -> int:
        return self.broker.depth(self.run)

    def dead(self) -> list[Dead]:
        return [
            Dead(d.delivery.body, str(d.delivery.headers.get("message_id", "")), d.reason.value, d.detail)
            for d in self.broker.dead_letters(self.run)
        ]

    def close(self) -> None:
        """Nothing is open outside this process."""


@dataclass
class RabbitBackend:
    """RabbitMQ."""

    node: PrivateNode
    run: str = field(default_factory=lambda: f"run-{secrets.token_hex(4)}")
    ends: list[AmqpAggregatorTransport | AmqpWorkerTransport] = field(default_factory=list)

    @property
    def topology(self) -> Topology:
        return Topology(self.run)

    def aggregator(self, *, prefetch: int = 64) -> AggregatorEnd:
        config = config_of(self.node, max_message_bytes=MAX_MESSAGE_BYTES)
        end = AmqpAggregatorTransport(config, self.topology, model_bytes=1000, prefetch=prefetch)
        self.ends.append(end)
        return end

    def worker(self, name: str) -> WorkerEnd:
        config = config_of(self.node, max_message_bytes=MAX_MESSAGE_BYTES)
        end = AmqpWorkerTransport(config, self.topology, worker=name)
        self.ends.append(end)
        return end

    def waiting(self) -> int:
        return ready(self.node, self.topology.updates)

    def dead(self) -> list[Dead]:
        return [
            Dead(body, p.message_id, str(p.headers.get("reason")), str(p.headers.get("detail")))
            for p, body in drain(self.node, self.topology.dead)
        ]

    def close(self) -> None:
        for end in self.ends:
            end.close()


__all__ = ["MAX_MESSAGE_BYTES", "Backend", "Dead", "Inbox", "MemoryBackend", "RabbitBackend"]
