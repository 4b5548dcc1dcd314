"""Signatures from end to end over a RabbitMQ whose administrator forges, changes and replays."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from pathlib import Path
from typing import Any

import pika
import pytest

from aggregator.checkpoint import CheckpointStore
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.topology import UPDATES, Topology
from tests.support.commands import fedmq, running
from tests.support.node import channel, config_of, drain, fresh_topology
from tests.support.signing import Keys
from tests.support.tasks import Line, Wide
from tests.support.together import federate
from tests.support.waiting import wait_for
from worker_client.training import initial_parameters

pytestmark = pytest.mark.broker

LONG = 60.0
SETTINGS = """
run = "{run}"
[aggregator]
buffer_size = 1
signing_key_file = "{aggregator}"
worker_keys_file = "{workers}"
operator_keys_file = "{operators}"
linger = 2.0
[worker]
name = "w1"
task = "tests.support.tasks:Line"
delay = 0.1
heartbeat_seconds = 0.5
signing_key_file = "{worker}"
aggregator_keys_file = "{aggregators}"
"""

Message = tuple[pika.BasicProperties, bytes]


@contextmanager
def tap(node: PrivateNode, exchange: str, key: str, queue: str) -> Iterator[None]:
    """The administrator has copies of what goes through an exchange in ``queue``."""
    with channel(node) as inside:
        inside.queue_declare(queue, durable=True)
        inside.queue_bind(queue, exchange, key)
    yield
    with channel(node) as inside:
        inside.queue_delete(queue)


def publish(node: PrivateNode, exchange: str, key: str, message: Message, **headers: object) -> None:
    original, body = message
    properties = copy(original)
    properties.headers = {**(original.headers or {}), **headers}
    with channel(node) as inside:
        inside.confirm_delivery()
        inside.basic_publish(exchange, key, body, properties, mandatory=True)


def flipped(message: Message, place: int) -> Message:
    properties, body = message
    return properties, body[:place] + bytes([body[place] ^ 1]) + body[place + 1 :]


def first_of(node: PrivateNode, queue: str) -> Message:
    found: list[Message] = []

    def come() -> bool:
        found.extend(drain(node, queue))
        return bool(found)

    wait_for(come, LONG, what=f"a copy in {queue}")
    return found[0]


def test_what_the_brokers_administrator_forges_changes_and_replays_is_refused(
    node: PrivateNode, tmp_path: Path
) -> None:
    keys, topology = Keys(tmp_path), fresh_topology("signed")
    files = {
        "aggregator": keys.private("aggregator"),
        "aggregators": keys.enrolled("aggregator"),
        "worker": keys.private("w1"),
        "workers": keys.enrolled("w1"),
        "operators": keys.enrolled("boss"),
    }
    (tmp_path / "fedmq.toml").write_text(SETTINGS.format(run=topology.run, **files))
    results = tmp_path / "runs" / topology.run
    store = CheckpointStore(results / "checkpoints", topology.run)
    model, parameters = initial_parameters(Line())
    store.create(model, parameters, now=0.0)

    def version() -> int:
        return store.load().version

    def further() -> None:
        now = version()
        wait_for(lambda: version() > now, LONG, what="a further version")

    with running(tmp_path, "aggregator", url=node.url, name="first") as aggregator:
        aggregator.wait_log("leads run")
        updates, versions = f"{topology.run}.tap.updates", f"{topology.run}.tap.versions"
        with (
            tap(node, UPDATES, topology.key("w1"), updates),
            tap(node, topology.parameters, "", versions),
            running(tmp_path, "worker", url=node.url, name="w1") as worker,
        ):
            wait_for(lambda: version() >= 2, LONG, what="two versions")
            # An update: its last tensor changed, its head changed, its signature taken away, and as it was
            update, old = first_of(node, updates), first_of(node, versions)
            body = update[1]
            for forged in (flipped(update, len(body) - 1), flipped(update, 200), (update[0], body[128:]), update):
                publish(node, UPDATES, topology.key("w1"), forged)
            wait_for(lambda: len(reasons(node, topology)) >= 3, LONG, what="dead letters")
            assert sorted(reasons(node, topology)) == ["bad-signature", "bad-signature", "not-signed"]
            # A version: without a signature, changed, and with a number that nothing could follow
            unsigned = (old[0], old[1][128:])
            for forged in (unsigned, flipped(old, len(old[1]) - 1)):
                publish(node, topology.parameters, "", forged, epoch=10**6, version=10**6)
            worker.wait_log("not believed")
            further()
            # A command of somebody who is no operator, and one of theirs
            stop = ("stop", "--wait", "30")
            refused = fedmq(tmp_path, *stop, url=node.url)
            assert (refused.code, "--key" in refused.err) == (2, True), refused
            further()
            assert worker.terminate() == 0
        assert aggregator.terminate() == 0

    # The worker comes back, and finds a version that was the aggregator's once
    believed = json.loads((results / "workers" / "w1" / "believed.json").read_text())["newest"]
    assert believed[1] >= 2
    publish(node, topology.parameters, "", old)
    with running(tmp_path, "worker", url=node.url, name="again") as worker:
        worker.wait_log("an old one was brought back")
        assert "confirmed" not in worker.log
        # Nor does the aggregator believe that it has made a version of the far future
        publish(node, topology.parameters, "", unsigned, epoch=10**6, version=10**6)
        with running(tmp_path, "aggregator", url=node.url, name="second") as aggregator:
            aggregator.wait_log("left aside: it bears no signature")
            further()
            signed = ("--key", str(keys.private("boss")), "--aggregator-keys", str(files["aggregators"]))
            done = fedmq(tmp_path, *stop, *signed, url=node.url)
            assert done.code == 0, done
            assert worker.wait() == 0
            assert aggregator.wait() == 0
    lines = [json.loads(line) for line in (results / "history.jsonl").read_text().splitlines()]
    applied = [entry for line in lines if line["kind"] == "version" for entry in line["updates"]]
    ids = [(entry["worker"], entry["incarnation"], entry["seq"]) for entry in applied]
    assert len(ids) == len(set(ids)) >= 4


def reasons(node: PrivateNode, topology: Topology) -> list[str]:
    """Of the dead letters that there are; they stay."""
    with channel(node) as inside:
        found: list[str] = []
        while True:
            method, properties, _ = inside.basic_get(topology.dead)
            if method is None:
                return found
            found.append(str(properties.headers["reason"]))


class Place:
    """RabbitMQ, for a federation of threads."""

    def __init__(self, node: PrivateNode, topology: Topology) -> None:
        self._node, self._topology = node, topology

    def aggregator(self, run: str, *, prefetch: int) -> AmqpAggregatorTransport:
        """Whatever the run is called: its names on the broker are this place's."""
        del run
        return AmqpAggregatorTransport(config_of(self._node), self._topology, model_bytes=10_000_000, prefetch=prefetch)

    def worker(self, run: str, name: str) -> AmqpWorkerTransport:
        del run
        return AmqpWorkerTransport(config_of(self._node), self._topology, worker=name)


@pytest.mark.parametrize("codec", ["", "int8"])
def test_chunks_and_deltas_of_versions_are_signed_for(codec: str, node: PrivateNode, tmp_path: Path) -> None:
    keys = Keys(tmp_path)
    settings: dict[str, Any] = {
        "buffer_size": 2,
        "stop_after_rounds": 2,
        "signing_key_file": keys.private("aggregator"),
        "worker_keys_file": keys.enrolled("w1", "w2"),
        "version_codec": codec,
    }
    workers = {name: {"signing_key_file": keys.private(name)} for name in ("w1", "w2")}
    place = Place(node, fresh_topology("signed"))

    ended = federate(
        tmp_path,
        Line() if codec else Wide(1),
        settings,
        workers,
        place=place,
        aggregator_keys_file=keys.enrolled("aggregator"),
    )

    assert (ended.outcome.reason, ended.outcome.version) == ("done", 2)
    assert set(ended.outcome.rejected) <= {"run-done"}
