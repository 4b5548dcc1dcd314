"""What an operator reads in RabbitMQ's admin UI, asked of its HTTP API: the run's own words."""

from __future__ import annotations

import base64
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.checkpoint import CheckpointStore
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpWorkerTransport
from broker.messages import Role
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.wire import decode
from tests.support.builders import spec_of, update_of
from tests.support.commands import running
from tests.support.ends import Ends, confirmed
from tests.support.node import admin_of, config_of, fresh_topology
from tests.support.waiting import Inbox, wait_for
from worker_client.sending import Sender

pytestmark = pytest.mark.broker


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


@pytest.fixture
def config(node: PrivateNode) -> BrokerConfig:
    return config_of(node)


@pytest.fixture
def topology() -> Topology:
    return fresh_topology("digits")


def shown(node: PrivateNode, queue: str) -> list[dict[str, Any]]:
    """What *Get messages* shows of ``queue``, which puts them back."""
    wish = {"count": 10, "ackmode": "ack_requeue_true", "encoding": "base64"}
    found: Any = admin_of(node)._request("POST", f"/queues/%2F/{queue}/get", body=wish)
    return list(found)


def test_the_headers_of_updates_and_chunks_say_what_they_are(
    node: PrivateNode, ends: Ends, config: BrokerConfig, topology: Topology
) -> None:
    aggregator, _ = ends.aggregator(config, topology)
    aggregator.admit("w3")
    worker, _ = ends.worker(config, topology, "w3")
    sender = Sender(topology.run, "w3", "i1", Role.TRAINER)

    def update(seq: int, size: int) -> Any:
        tensors = {"w": np.ones(size, np.float32)}
        return update_of(tensors, run=topology.run, worker="w3", incarnation="i1", seq=seq, base_version=7, examples=32)

    def queues() -> set[str]:
        return {row["name"] for row in admin_of(node).queues()}

    wait_for(lambda: topology.outbox("w3") in queues(), what="the outbox")
    if next(row for row in admin_of(node).queues() if row["name"] == topology.updates)["type"] == "quorum":
        pytest.skip("RabbitMQ shows no messages of a quorum queue with a single active consumer")
    aggregator.close()  # so that they wait in the queue
    confirmed(worker.publish, sender.cut(update(1, 10), 100_000))
    confirmed(worker.publish, sender.cut(update(2, 60_000), 100_000))

    wait_for(lambda: len(shown(node, topology.updates)) == 2, what="two updates")
    whole, manifest = shown(node, topology.updates)
    of_all = {"run": topology.run, "worker": "w3", "incarnation": "i1", "base_version": 7, "examples": 32, "steps": 0}
    assert whole["properties"]["headers"].items() >= {**of_all, "seq": 1}.items()
    assert manifest["properties"]["headers"].items() >= {**of_all, "seq": 2, "chunks": 3, "bytes": 240_000}.items()
    for message in (whole, manifest):
        assert message["exchange"] == "fedmq.updates"
        assert message["routing_key"] == f"{topology.run}.w3"
        properties = message["properties"]
        assert (properties["app_id"], properties["type"], properties["delivery_mode"]) == ("fedmq", "update", 2)
        assert abs(properties["timestamp"] - time.time()) < 600
    assert whole["properties"]["message_id"] == "w3/i1/1"
    assert decode(base64.b64decode(whole["payload"])).id.seq == 1  # type: ignore[union-attr]

    chunks = shown(node, topology.outbox("w3"))
    assert [chunk["properties"]["headers"]["chunk"] for chunk in chunks] == [0, 1, 2]
    for chunk in chunks:
        assert chunk["properties"]["headers"].items() >= {**of_all, "seq": 2, "chunks": 3}.items()
        assert chunk["routing_key"] == f"{topology.run}.w3.chunk"


def test_an_evaluator_is_called_one(node: PrivateNode, config: BrokerConfig, topology: Topology) -> None:
    evaluator = AmqpWorkerTransport(config, topology, worker="e1", role="evaluator")
    evaluator.open(Inbox())

    def names() -> set[str]:
        found = [row.get("client_properties", {}).get("connection_name", "") for row in admin_of(node).connections()]
        return {name for name in found if topology.run in name}

    try:
        expected = {f"fedmq evaluator e1 · run {topology.run} · {what}" for what in ("publish", "consume")}
        wait_for(lambda: names() == expected, what="two connections of the evaluator")
    finally:
        evaluator.close()


def test_the_consumers_of_an_aggregator_tell_its_host_its_process_and_its_epoch(
    node: PrivateNode, topology: Topology, tmp_path: Path
) -> None:
    """A process, which takes two seconds to lead."""
    tensors = {"w": np.zeros(3, np.float32)}
    store = CheckpointStore(tmp_path / "runs" / topology.run / "checkpoints", topology.run)
    store.create(spec_of(tensors), tensors, now=time.time())
    store.claim()  # by one that is gone

    def tag(queue: str) -> str:
        rows = [row for row in admin_of(node).consumers() if row["queue"]["name"] == queue]
        return str(rows[0]["consumer_tag"]) if rows else ""

    with running(tmp_path, "aggregator", "--run", topology.run, url=node.url) as process:
        found = wait_for(lambda: tag(topology.updates), what="a consumer of updates", timeout=60)
        pid = process.process.pid
        assert re.fullmatch(rf"aggregator/[^/]+/{pid}/epoch 2", found)
        # Before it was its turn, nobody knew.
        assert re.fullmatch(rf"aggregator/[^/]+/{pid}-turn", tag(topology.turn))
        process.wait_log("leads run")
        assert ", epoch 2" in process.log
        assert store.stored_epoch() == 2
