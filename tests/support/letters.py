"""Runs with rejected updates, as aggregators and brokers leave them."""

from __future__ import annotations

import pika

from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.messages import Update
from broker.topology import DEAD, Topology
from broker.wire import encode
from tests.support.builders import update_of, vector
from tests.support.node import channel, config_of, fresh_topology, ready
from tests.support.waiting import PATIENCE, Inbox

__all__ = ["TIME", "bury", "declared", "ids_in", "take", "update"]

#: When the aggregator of these tests rejects: 2026-08-01T12:00:00 UTC.
TIME = 1_785_585_600


def declared(node: PrivateNode, *, queue_type: str = "auto") -> Topology:
    """A run whose queues are declared, and whose aggregator has gone."""
    topology = fresh_topology("dead")
    end = AmqpAggregatorTransport(config_of(node, queue_type=queue_type), topology, model_bytes=1000, prefetch=4)
    inbox = Inbox()
    end.open(inbox, wait=PATIENCE)
    inbox.wait(inbox.connections)
    end.close()
    return topology


def update(topology: Topology, seq: int = 0, worker: str = "w1") -> Update:
    """A small update."""
    return update_of({"w": vector(3.0, 4.0)}, run=topology.run, worker=worker, seq=seq, examples=32)


def bury(
    node: PrivateNode,
    topology: Topology,
    *updates: Update,
    reason: str = "not-finite",
    body: bytes | None = None,
    headers: dict[str, str | int] | None = None,
) -> None:
    """Put ``updates`` into the dead letters as an aggregator does, confirmed; ``body`` instead of theirs."""
    with channel(node) as inside:
        inside.confirm_delivery()
        for one in updates:
            facts = {
                "run": one.run,
                "worker": one.id.worker,
                "base_version": one.base_version,
                "examples": one.examples,
                "reason": reason,
                "detail": "a test",
                "time": TIME,
            }
            properties = pika.BasicProperties(
                delivery_mode=2,
                message_id=str(one.id),
                type="update",
                headers=facts | (headers or {}),
            )
            content = encode(one) if body is None else body
            inside.basic_publish(DEAD, topology.key(one.id.worker), content, properties, mandatory=True)


def take(node: PrivateNode, queue: str) -> list[tuple[pika.BasicProperties, bytes]]:
    """Take out what is ready in ``queue``, in order.

    By a consumer: a quorum queue with a single active consumer knows no ``basic.get``.
    """
    taken: list[tuple[pika.BasicProperties, bytes]] = []
    count = ready(node, queue)
    with channel(node) as inside:
        while len(taken) < count:
            method, properties, body = next(inside.consume(queue, auto_ack=True, inactivity_timeout=PATIENCE))
            assert method is not None, f"{len(taken)} of {count} messages came out of {queue}"
            taken.append((properties, body))
    return taken


def ids_in(node: PrivateNode, queue: str) -> list[str]:
    """The message ids in ``queue``, in order. They are taken out."""
    return [str(properties.message_id) for properties, _ in take(node, queue)]
