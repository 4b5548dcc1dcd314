"""Streams and outboxes that were made for a smaller model, or by ``fedmq broker check``, which knows no size."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Literal

import pika
import pika.exceptions
import pytest

from broker.amqp.node import PrivateNode
from broker.topology import UPDATES, Topology
from broker.transport import Outgoing, Source
from tests.support.ends import Ends, confirmed
from tests.support.node import channel, config_of, fresh_topology
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

#: Five segments of a stream that was made for nothing.
MODEL_BYTES = 5_000_000
CHUNKS = tuple(bytes([index]) * 500_000 for index in range(10))


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def type_of(node: PrivateNode, topology: Topology) -> Literal["classic", "quorum"]:
    return "classic" if has(node, topology, "classic", 0) else "quorum"


def has(node: PrivateNode, topology: Topology, kind: Literal["classic", "quorum"], model_bytes: int) -> bool:
    """Whether the outbox of w1 has the room that a model of this size asks for."""
    queue = topology.outbox_queue("w1", kind, model_bytes)
    with channel(node) as raw:
        try:
            raw.queue_declare(queue.name, durable=True, arguments={"x-queue-type": kind, **queue.arguments})
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return True


def exists(node: PrivateNode, name: str) -> bool:
    with channel(node) as raw:
        try:
            raw.queue_declare(name, passive=True)
        except pika.exceptions.ChannelClosedByBroker:
            return False
        return True


def made_for_nothing(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    """What a run's aggregator of a small model leaves behind."""
    small, _ = ends.aggregator(config_of(node), topology, model_bytes=0)
    small.admit("w1")
    wait_for(lambda: exists(node, topology.outbox("w1")), what="an outbox")
    small.close()


def test_a_version_is_whole_where_the_stream_was_made_for_smaller_ones(node: PrivateNode, ends: Ends) -> None:
    topology = fresh_topology("room")
    made_for_nothing(node, ends, topology)
    aggregator, _ = ends.aggregator(config_of(node), topology, model_bytes=MODEL_BYTES)
    headers: dict[str, str | int] = {"epoch": 1, "version": 1, "attempt": 0, "chunks": len(CHUNKS)}
    message = Outgoing(body=b"v1", chunks=CHUNKS, message_id="r/1/1", headers=headers)
    aggregator.broadcast(message).result(60)
    worker, inbox = ends.worker(config_of(node), topology)
    worker.fetch(inbox.wait_delivery(1, Source.PARAMETERS))
    assert inbox.wait_delivery(2, Source.PARAMETERS).chunks == CHUNKS


def test_an_empty_outbox_is_made_anew_and_one_with_chunks_in_it_is_kept(
    node: PrivateNode, ends: Ends, caplog: pytest.LogCaptureFixture
) -> None:
    topology = fresh_topology("room")
    made_for_nothing(node, ends, topology)
    kind = type_of(node, topology)
    with channel(node) as raw:
        raw.confirm_delivery()
        raw.basic_publish(UPDATES, topology.chunk_key("w1"), b"a chunk", pika.BasicProperties(message_id="w1/i/0#0"))
    with caplog.at_level(logging.WARNING, "fedmq.broker"):
        first, _ = ends.aggregator(config_of(node), topology, model_bytes=MODEL_BYTES)
        first.admit("w1")
        wait_for(lambda: "is not empty" in caplog.text, what="a warning")
    assert has(node, topology, kind, 0)
    first.close()
    with channel(node) as raw:
        raw.queue_purge(topology.outbox("w1"))
    second, _ = ends.aggregator(config_of(node), topology, model_bytes=MODEL_BYTES)
    second.admit("w1")
    wait_for(lambda: has(node, topology, kind, MODEL_BYTES), what="an outbox with more room")
    worker, _ = ends.worker(config_of(node), topology)
    facts: dict[str, str | int] = {"worker": "w1", "chunks": len(CHUNKS), "bytes": MODEL_BYTES}
    confirmed(worker.publish, Outgoing(body=b"update", chunks=CHUNKS, message_id="w1/i/1", headers=facts))
