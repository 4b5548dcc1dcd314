"""Streams: the room that they have, where things stand in them, and who reads them too slowly."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterator
from typing import Any, Literal

import pika
import pika.exceptions
import pytest

from broker.amqp import versions
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.topology import UPDATES, Topology
from broker.transport import Outgoing, Source
from tests.support.ends import Ends, confirmed
from tests.support.node import channel, config_of, fresh_topology
from tests.support.proxy import Direction, Proxy
from tests.support.waiting import Inbox, wait_for

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


def broadcast(aggregator: AmqpAggregatorTransport, number: int, chunks: tuple[bytes, ...] = CHUNKS) -> None:
    headers: dict[str, str | int] = {"epoch": 1, "version": number, "attempt": 0, "chunks": len(chunks)}
    message = Outgoing(body=b"v", chunks=chunks, message_id=f"r/1/{number}", headers=headers)
    aggregator.broadcast(message).result(60)


def test_a_version_is_whole_where_the_stream_was_made_for_smaller_ones(node: PrivateNode, ends: Ends) -> None:
    topology = fresh_topology("room")
    made_for_nothing(node, ends, topology)
    aggregator, _ = ends.aggregator(config_of(node), topology, model_bytes=MODEL_BYTES)
    broadcast(aggregator, 1)
    worker, inbox = ends.worker(config_of(node), topology)
    worker.fetch(inbox.wait_delivery(1, Source.PARAMETERS))
    assert inbox.wait_delivery(2, Source.PARAMETERS).chunks == CHUNKS


def test_more_versions_are_kept_for_slow_workers_if_asked_for(node: PrivateNode, ends: Ends) -> None:
    """Also of a run whose stream was made before that was set."""
    topology = fresh_topology("room")
    ends.aggregator(config_of(node), topology, model_bytes=1_000_000)[0].close()
    aggregator, _ = ends.aggregator(config_of(node, kept_versions=30), topology, model_bytes=1_000_000)
    worker, inbox = ends.worker(config_of(node), topology)
    broadcast(aggregator, 1, CHUNKS[:2])
    first = inbox.wait_delivery(1, Source.PARAMETERS)
    for number in range(2, 21):
        broadcast(aggregator, number, CHUNKS[:2])
    worker.fetch(first)
    inbox.wait(lambda: any(d.chunks == CHUNKS[:2] for d in inbox.deliveries(Source.PARAMETERS)))


def test_manifests_tell_where_the_chunks_are_also_after_many_segments(node: PrivateNode, ends: Ends) -> None:
    topology = fresh_topology("room")
    aggregator, _ = ends.aggregator(config_of(node), topology, model_bytes=0)
    for number in range(1, 16):
        broadcast(aggregator, number, CHUNKS[:2])
    place = header_of(node, topology.chunks, "r/1/15#0", "x-stream-offset")
    assert header_of(node, topology.parameters, "r/1/15", "offsets") == f"{place}+2"


def header_of(node: PrivateNode, stream: str, message_id: str, header: str) -> object:
    """One header of one message in ``stream``."""
    found: list[object] = []

    def look(raw: Any, method: Any, properties: pika.BasicProperties, _body: bytes) -> None:
        raw.basic_ack(method.delivery_tag)
        if properties.message_id == message_id:
            found.append((properties.headers or {})[header])

    # Pika rejects what it still holds when it closes, which a stream does not take.
    with contextlib.suppress(pika.exceptions.ConnectionClosedByBroker), channel(node) as raw:
        raw.basic_qos(prefetch_count=10)
        raw.basic_consume(stream, look, arguments={"x-stream-offset": "first"})

        def has_come() -> bool:
            raw.connection.process_data_events(0.1)
            return bool(found)

        wait_for(has_come, 60, what=message_id)
    return found[0]


def test_what_was_dropped_is_not_looked_for(node: PrivateNode, ends: Ends) -> None:
    """Its place is gone: the worker is told at once, and not after the chunks of all versions since."""
    topology = fresh_topology("room")
    aggregator, _ = ends.aggregator(config_of(node), topology, model_bytes=MODEL_BYTES // 2)
    with Proxy.to(node.url) as proxy:
        worker, inbox = ends.worker(config_of(node, url=proxy.url(node.url)), topology)
        broadcast(aggregator, 1)
        first = inbox.wait_delivery(1, Source.PARAMETERS)
        for number in range(2, 13):
            broadcast(aggregator, number)
        before = proxy.carried[Direction.DOWN]
        worker.fetch(first)
        wait_for(lambda: any(d.lost for d in inbox.deliveries(Source.PARAMETERS)), what="word of what is gone")
        # Those that were on their way at once. To the end of the stream they are three or four times as many.
        assert proxy.carried[Direction.DOWN] - before < 15 * len(CHUNKS[0])


def test_who_reads_more_slowly_than_versions_come_passes_some_over(
    node: PrivateNode, ends: Ends, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(versions, "LAG_SECONDS", 1.0)
    topology = fresh_topology("room")
    ends.aggregator(config_of(node), topology, model_bytes=1000)
    with Proxy.to(node.url) as proxy, channel(node) as raw:
        # One after the other, as versions are: RabbitMQ puts what comes at once into one block, and begins with it.
        raw.confirm_delivery()
        tell(raw, topology, 0)
        _, inbox = ends.worker(config_of(node, url=proxy.url(node.url)), topology)
        inbox.wait_delivery(1, Source.PARAMETERS)
        # Two for each time that a message takes to go and an acknowledgement to return: 400 in three minutes.
        proxy.delay(0.5)
        for number in range(1, 401):
            tell(raw, topology, number)
        wait_for(lambda: newest_of(inbox) == 400, 90, what="the newest version")
        assert len(inbox.deliveries(Source.PARAMETERS)) < 300
        assert inbox.losses() == [], "on the same connection"
        proxy.heal()


def tell(raw: Any, topology: Topology, number: int) -> None:
    headers = {"epoch": 1, "version": number, "attempt": 0}
    properties = pika.BasicProperties(headers=headers, timestamp=int(time.time()), delivery_mode=2)
    raw.basic_publish(topology.parameters, "", b"v", properties)


def newest_of(inbox: Inbox) -> int:
    return max(int(delivery.headers["version"]) for delivery in inbox.deliveries(Source.PARAMETERS))


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
