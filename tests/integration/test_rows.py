"""A strategy that needs all updates of a round, and aggregators that are killed in the middle of one."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aggregator.core.ledger import Ledger
from aggregator.rowfile import StoredRows
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpWorkerTransport
from broker.errors import CheckpointError
from broker.transport import Outgoing
from broker.wire import encode
from tests.support.builders import spec_of, update_of
from tests.support.commands import fedmq
from tests.support.ends import confirmed
from tests.support.node import config_of
from tests.support.site import Site
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

ZEROS = {"w": np.zeros(1000, np.float32)}
SETTINGS = {
    "strategy": "median",
    "buffer_size": 5,
    "learning_rate": 1.0,
    "commit_count": 1,
    "keep_updates": True,
    "linger": 0.0,
}


@pytest.fixture
def place(tmp_path: Path, node: PrivateNode) -> Iterator[Site]:
    with Site(tmp_path, node.url, workers=1, settings={"aggregator": SETTINGS}, prefix="rows") as place:
        place.store.create(spec_of(ZEROS), ZEROS, now=time.time())
        yield place


def rows(place: Site) -> list[int]:
    """How many updates of the open round are durable, by file."""
    try:
        found = place.store.load().accumulator.rows
    except CheckpointError:  # a file that goes while it is read
        return []
    return [len(sums) for _, sums in found.parts] if isinstance(found, StoredRows) else []


def test_rows_of_killed_aggregators_are_in_the_median_once(place: Site, node: PrivateNode, tmp_path: Path) -> None:
    source = np.random.default_rng(3)
    updates = [source.standard_normal(1000).astype(np.float32) for _ in range(10)]
    worker = AmqpWorkerTransport(config_of(node), place.topology, worker="w0")
    worker.open(lambda _item: None, wait=60)

    def publish(first: int, last: int) -> None:
        for seq in range(first, last):
            update = update_of({"w": updates[seq]}, seq=seq, run=place.topology.run)
            confirmed(worker.publish, Outgoing(body=encode(update), message_id=str(update.id)))

    try:
        first = place.command("aggregator")
        wait_for(lambda: place.epochs() == [1], 60, what="its start")
        second = place.command("aggregator", log="second")
        publish(0, 2)
        wait_for(lambda: rows(place) == [2], 60, what="two rows")
        first.kill()
        wait_for(lambda: place.epochs() == [1, 2], 60, what="the second takes over")
        publish(2, 3)
        wait_for(lambda: rows(place) == [2, 1], 60, what="a row in a file of its own")
        second.kill()
        third = place.command("aggregator", log="third")
        publish(3, 10)
        wait_for(lambda: place.version() == 2, 60, what="two versions")
        third.terminate()
        assert third.wait(30) == 0, place.log("third")[-3000:]
    finally:
        worker.close()

    snapshot = place.store.load()
    expected = np.median(updates[:5], axis=0) + np.median(updates[5:], axis=0)
    np.testing.assert_array_equal(snapshot.parameters["w"], expected.astype(np.float32))
    assert sorted(one.seq for one in Ledger(snapshot.ledger)) == list(range(10))
    assert fedmq(tmp_path, "replay").code == 0
