"""Uploads that are not what they should be: rejected with a reason, and the run goes on with the good ones.

Memory stays bounded because nothing is fetched before the manifest was found good.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pika
import pytest
import xxhash
import zstandard

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.results import Outcome
from aggregator.service import AggregatorService
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.messages import Hello, Mode, ModelSpec, TensorSpec, Update, UpdateId
from broker.topology import CONTROL, UPDATES, Topology
from broker.wire import decode, encode, encode_in_chunks
from broker.wire.envelope import pack, unpack
from tests.support.node import channel, config_of, drain, fresh_topology, ready
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

MODEL = ModelSpec((TensorSpec("w", (60_000,), "float32"),))
CHUNK = 65_536
WORKER = "w1"

Channel = Any


class Site:
    """A run that closes a round at each good update, and a client that can send anything."""

    def __init__(self, node: PrivateNode, folder: Path) -> None:
        self.node, self.topology, self.folder = node, fresh_topology("chunks"), folder
        self.store = CheckpointStore(folder / "checkpoints", self.topology.run)
        self.store.create(MODEL, {"w": np.zeros(60_000, np.float32)}, now=0.0)
        self.seq = 0
        self.start(buffer_size=1)

    def start(self, *, buffer_size: int, heartbeat: int = 5) -> None:
        store = CheckpointStore(self.folder / "checkpoints", self.topology.run)
        config = AggregatorConfig(buffer_size=buffer_size, linger=0.0, staleness="constant")
        self.service = AggregatorService(
            folder=self.folder, run=self.topology.run, config=config, store=store, chunk_bytes=CHUNK
        )
        self.outcome: Outcome | None = None
        self._transport = AmqpAggregatorTransport(
            config_of(self.node, heartbeat=heartbeat), self.topology, model_bytes=MODEL.nbytes, prefetch=8
        )
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self.outcome = self.service.run(self._transport)

    def version(self) -> int:
        return self.store.load().version

    def update(self, value: float = 1.0) -> Update:
        self.seq += 1
        return Update(
            run=self.topology.run,
            id=UpdateId(WORKER, "i", self.seq),
            base_version=0,
            base_epoch=0,
            mode=Mode.DELTA,
            examples=1,
            model=MODEL,
            tensors={"w": np.full(60_000, value, np.float32)},
        )

    def close(self) -> Outcome:
        self.service.stop()
        self._thread.join(60)
        assert self.outcome is not None
        return self.outcome


@pytest.fixture
def site(node: PrivateNode, tmp_path: Path) -> Iterator[tuple[Site, Channel]]:
    site = Site(node, tmp_path)
    with channel(node) as raw:
        wait_for(lambda: exists(node, site.topology.updates), what="the run's queues")
        raw.confirm_delivery()
        wait_for(lambda: says_hello(raw, site.topology), what="a queue for hellos")
        wait_for(lambda: has_outbox(raw, site.topology), what="an outbox")
        yield site, raw
    if site.outcome is None:
        site.close()


def exists(node: PrivateNode, queue: str) -> bool:
    try:
        ready(node, queue)
    except pika.exceptions.ChannelClosedByBroker:
        return False
    return True


def has_outbox(raw: Channel, topology: Topology) -> bool:
    """Whether a chunk arrives; this one is of an upload that is never completed."""
    properties = pika.BasicProperties(message_id=f"{WORKER}/i/0#0", delivery_mode=2, user_id=user_of(raw))
    try:
        raw.basic_publish(UPDATES, topology.chunk_key(WORKER), b"", properties, mandatory=True)
    except pika.exceptions.UnroutableError:
        return False
    return True


def says_hello(raw: Channel, topology: Topology) -> bool:
    hello = Hello(run=topology.run, worker=WORKER, incarnation="i")
    try:
        properties = pika.BasicProperties(user_id=user_of(raw))
        raw.basic_publish(CONTROL, topology.key(WORKER), encode(hello), properties, mandatory=True)
    except pika.exceptions.UnroutableError:
        return False
    return True


def parts_of(update: Update) -> tuple[bytes, list[bytes]]:
    body, chunks = encode_in_chunks(update, str(update.id), CHUNK)
    return body, list(chunks)


def user_of(raw: Channel) -> str:
    """The account, which is the aggregator's too: the broker vouches for it, and it may speak for any worker."""
    return str(raw.connection._impl.params.credentials.username)


def send_chunk(raw: Channel, topology: Topology, update: Update, index: int, body: bytes) -> None:
    properties = pika.BasicProperties(message_id=f"{update.id}#{index}", delivery_mode=2, user_id=user_of(raw))
    raw.basic_publish(UPDATES, topology.chunk_key(WORKER), body, properties, mandatory=True)


def send_manifest(raw: Channel, topology: Topology, update: Update, body: bytes, **headers: int) -> None:
    facts = {"worker": WORKER, "chunks": 4, "bytes": MODEL.nbytes, **headers}
    properties = pika.BasicProperties(message_id=str(update.id), headers=facts, delivery_mode=2, user_id=user_of(raw))
    raw.basic_publish(UPDATES, topology.key(WORKER), body, properties, mandatory=True)


def send(raw: Channel, topology: Topology, update: Update, order: list[int] | None = None) -> None:
    body, chunks = parts_of(update)
    for index in order or range(len(chunks)):
        send_chunk(raw, topology, update, index, chunks[index])
    send_manifest(raw, topology, update, body)


def dead_reason(site: Site) -> str:
    letters: list[str] = []

    def look() -> bool:
        for properties, _ in drain(site.node, site.topology.dead):
            letters.append(str((properties.headers or {})["reason"]))
        return bool(letters)

    wait_for(look, 60, what="a dead letter")
    assert len(letters) == 1
    return letters[0]


def goes_on(site: Site, raw: Channel) -> None:
    """A good update still makes a version, and nothing is left behind."""
    before = site.version()
    send(raw, site.topology, site.update())
    wait_for(lambda: site.version() == before + 1, 60, what="a version")
    wait_for(lambda: ready(site.node, site.topology.outbox(WORKER)) == 0, what="an empty outbox")
    outcome = site.close()
    assert outcome.version == before + 1
    assert ready(site.node, site.topology.outbox(WORKER)) == 0
    assert ready(site.node, site.topology.updates) == 0


def test_chunks_in_any_order_and_doubled_ones_make_one_update(site: tuple[Site, Channel]) -> None:
    at, raw = site
    send(raw, at.topology, at.update(), order=[3, 1, 1, 0, 2, 0])
    wait_for(lambda: at.version() == 1, 60, what="a version")
    goes_on(at, raw)


def test_what_an_abandoned_upload_left_is_passed_over(site: tuple[Site, Channel]) -> None:
    at, raw = site
    for _ in range(2):
        update = at.update()
        send_chunk(raw, at.topology, update, 0, parts_of(update)[1][0])
    goes_on(at, raw)
    assert not drain(at.node, at.topology.dead)


def test_a_missing_chunk(site: tuple[Site, Channel]) -> None:
    at, raw = site
    update = at.update()
    body, chunks = parts_of(update)
    for index in (0, 1, 3):
        send_chunk(raw, at.topology, update, index, chunks[index])
    send_manifest(raw, at.topology, update, body)
    assert dead_reason(at) == "incomplete"
    goes_on(at, raw)


Change = Callable[[list[bytes]], list[bytes]]


def flipped(chunks: list[bytes]) -> list[bytes]:
    return [chunks[0][:-1] + bytes([chunks[0][-1] ^ 1]), *chunks[1:]]


def of_another(chunks: list[bytes]) -> list[bytes]:
    header, data = unpack(chunks[0])
    return [pack(header | {"of": "w1/i/999"}, [data]), *chunks[1:]]


def swapped(chunks: list[bytes]) -> list[bytes]:
    return [chunks[1], chunks[0], *chunks[2:]]


def exploding(chunks: list[bytes]) -> list[bytes]:
    header, _ = unpack(chunks[0])
    bomb = zstandard.ZstdCompressor().compress(bytes(2**28))
    return [pack(header | {"zstd": True}, [memoryview(bomb)]), *chunks[1:]]


@pytest.mark.parametrize("change", [flipped, of_another, swapped, exploding])
def test_chunks_that_are_not_those_of_the_manifest(site: tuple[Site, Channel], change: Change) -> None:
    at, raw = site
    update = at.update()
    body, chunks = parts_of(update)
    for index, chunk in enumerate(change(chunks)):
        send_chunk(raw, at.topology, update, index, chunk)
    send_manifest(raw, at.topology, update, body)
    assert dead_reason(at) == "malformed"
    goes_on(at, raw)


def test_chunks_larger_than_announced_are_not_taken_in(site: tuple[Site, Channel]) -> None:
    at, raw = site
    update = at.update()
    body, _ = parts_of(update)
    for index in range(4):
        send_chunk(raw, at.topology, update, index, bytes(10_000_000))
    send_manifest(raw, at.topology, update, body)
    assert dead_reason(at) == "incomplete"
    goes_on(at, raw)


def test_a_manifest_that_lies_about_its_size(site: tuple[Site, Channel]) -> None:
    at, raw = site
    update = at.update()
    body, chunks = parts_of(update)
    header, _ = unpack(body)
    sums = ((2**40, "0" * 32), *header["data"]["chunks"])
    for lie in ({"nbytes": 2**40, "chunks": sums}, {"nbytes": header["data"]["nbytes"], "chunks": sums}):
        send_manifest(raw, at.topology, at.update(), pack(header | {"data": lie}))
        assert dead_reason(at) == "malformed"
    # Its header and its properties say different things.
    send_manifest(raw, at.topology, at.update(), body)
    assert dead_reason(at) == "malformed"
    for more in ({"chunks": 1_000_000}, {"bytes": 2**40}):
        send_manifest(raw, at.topology, update, body, **more)
        assert dead_reason(at) == "malformed"
    assert len(chunks) == 4
    goes_on(at, raw)


def test_a_larger_model_is_refused_before_anything_is_fetched(site: tuple[Site, Channel]) -> None:
    at, raw = site
    model = ModelSpec((TensorSpec("w", (2**28,), "float32"),))
    size = model.nbytes // 4
    header, _ = unpack(parts_of(at.update())[0])
    header["model"] = {"frozen": "", "tensors": [["w", [2**28], "float32", "parameter"]]}
    header["data"] = {"nbytes": model.nbytes, "chunks": [[size, xxhash.xxh3_128_hexdigest(b"")]] * 4}
    body = pack(header)
    decode(body)
    update = at.update()
    header["id"] = {"worker": WORKER, "incarnation": "i", "seq": at.seq}
    send_manifest(raw, at.topology, update, pack(header), bytes=model.nbytes)
    assert dead_reason(at) == "model-mismatch"
    goes_on(at, raw)


def test_an_update_that_comes_twice_counts_once_and_its_second_chunks_are_dropped(site: tuple[Site, Channel]) -> None:
    at, raw = site
    update = at.update()
    send(raw, at.topology, update)
    send(raw, at.topology, update)
    wait_for(lambda: at.version() == 1, 60, what="a version")
    wait_for(lambda: ready(at.node, at.topology.updates) == 0, what="an empty queue")
    goes_on(at, raw)
    assert at.outcome is not None
    assert at.outcome.applied == 2


def test_an_outbox_is_full_at_some_point(site: tuple[Site, Channel]) -> None:
    """A worker that uploads without end, and never completes anything, fills its own outbox and nothing else."""
    at, raw = site
    chunk = bytes(4_000_000)

    def is_full() -> bool:
        try:
            send_chunk(raw, at.topology, at.update(), 0, chunk)
        except pika.exceptions.NackError:
            return True
        return False

    assert any(is_full() for _ in range(25))
    send_manifest(raw, at.topology, update := at.update(), parts_of(update)[0])
    assert dead_reason(at) == "incomplete"
    goes_on(at, raw)


def test_an_outbox_that_is_deleted_is_there_again(site: tuple[Site, Channel]) -> None:
    at, raw = site
    raw.queue_delete(at.topology.outbox(WORKER))
    update = at.update()
    chunk = parts_of(update)[1][0]

    def is_there() -> bool:
        try:
            send_chunk(raw, at.topology, update, 0, chunk)
        except pika.exceptions.UnroutableError:
            return False
        return True

    wait_for(is_there, 60, what="an outbox")
    send(raw, at.topology, update)
    wait_for(lambda: at.version() == 1, 60, what="a version")
    goes_on(at, raw)


def test_a_channel_that_ends_gives_back_what_was_fetched(site: tuple[Site, Channel]) -> None:
    """Somebody deletes a queue of the run: the channel is set up again, on the same connection."""
    at, raw = site
    at.service.stop()
    wait_for(lambda: at.outcome is not None, 60, what="an aggregator that has left")
    at.start(buffer_size=2)
    send(raw, at.topology, at.update())
    # One stays: that by which it was seen that there is an outbox. Nobody can be sure so soon that it is of no use.
    wait_for(lambda: ready(at.node, at.topology.outbox(WORKER)) == 1, 60, what="chunks in the aggregator's hands")
    raw.queue_delete(at.topology.control)
    wait_for(lambda: ready(at.node, at.topology.outbox(WORKER)) == 5, 60, what="chunks that were given back")
    send(raw, at.topology, at.update())
    wait_for(lambda: at.version() == 1, 60, what="a version")
    assert at.close().applied == 2
    assert ready(at.node, at.topology.updates) == 0


def take_over(at: Site, raw: Channel) -> None:
    """Another aggregator, which does not know what the one before still holds."""
    send(raw, at.topology, at.update())
    wait_for(lambda: at.version() == 1, 60, what="a version")
    wait_for(lambda: ready(at.node, at.topology.outbox(WORKER)) == 0, 60, what="an empty outbox")
    at.close()
    at.start(buffer_size=1, heartbeat=60)


def send_parts(raw: Channel, topology: Topology, *updates: Update) -> None:
    for update in updates:
        for index, chunk in enumerate(parts_of(update)[1]):
            send_chunk(raw, topology, update, index, chunk)


def test_manifests_that_come_in_another_order_than_chunks(site: tuple[Site, Channel]) -> None:
    """As from connections that broke and that the broker gives up late."""
    at, raw = site
    take_over(at, raw)
    other, first, second = replace(at.update(), id=UpdateId(WORKER, "j", 0)), at.update(), at.update()
    send_parts(raw, at.topology, other, first, second)
    for update in (second, other, first):
        send_manifest(raw, at.topology, update, parts_of(update)[0])
    wait_for(lambda: at.version() == 4, 60, what="three versions")
    assert not drain(at.node, at.topology.dead)
    goes_on(at, raw)


def test_a_rejected_update_takes_nothing_of_others_with_it(site: tuple[Site, Channel]) -> None:
    at, raw = site
    take_over(at, raw)
    other = replace(at.update(), id=UpdateId(WORKER, "j", 0))
    # One that is found bad when it was fetched, and one that is not fetched.
    spoiled, untimely = at.update(float("nan")), replace(at.update(), base_version=99)
    send_parts(raw, at.topology, other, spoiled, untimely)
    for update, reason in ((spoiled, "not-finite"), (untimely, "future-version")):
        send_manifest(raw, at.topology, update, parts_of(update)[0])
        assert dead_reason(at) == reason
    send_manifest(raw, at.topology, other, parts_of(other)[0])
    wait_for(lambda: at.version() == 2, 60, what="a version")
    goes_on(at, raw)
