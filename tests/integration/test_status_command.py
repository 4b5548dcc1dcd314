"""``fedmq status`` on a real broker: with its management API and without, with aggregators and when they have gone."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from aggregator import status
from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.service import AggregatorService
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.messages import Event, EventKind, Hello
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Outgoing
from broker.wire import encode
from fedmq.monitoring import watching
from fedmq.monitoring.watching import Watching
from tests.support.builders import spec_of, update_of, vector
from tests.support.commands import assert_one_message, fedmq, running
from tests.support.node import add_user, config_of, fresh_topology
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

SCHEMA = json.loads((Path(__file__).parents[2] / "docs" / "status.schema.json").read_text())
#: Nobody listens there.
NO_API = "http://127.0.0.1:1"
PATIENCE = 60.0


class Run:
    """A run with aggregators on threads, and a worker that says what the test wants."""

    def __init__(self, folder: Path, node: PrivateNode, stack: ExitStack) -> None:
        self.topology: Topology = fresh_topology("status")
        self.name = self.topology.run
        self.config = config_of(node)
        self._folder, self._stack, self._count = folder, stack, 0
        tensors = {"w": vector(0, 0)}
        self._store().create(spec_of(tensors), tensors, now=0.0)

    def _store(self) -> CheckpointStore:
        return CheckpointStore(self._folder / "checkpoints", self.name)

    def aggregator(self) -> tuple[AggregatorService, threading.Thread]:
        """One more aggregator."""
        config = AggregatorConfig(buffer_size=1, linger=0.0)
        service = AggregatorService(folder=self._folder, run=self.name, config=config, store=self._store())
        self._count += 1
        transport = AmqpAggregatorTransport(
            self.config, self.topology, model_bytes=8, prefetch=10, consumer_tag=f"aggregator/host/{self._count}"
        )
        thread = threading.Thread(target=service.run, args=(transport,), daemon=True)
        thread.start()
        self._stack.callback(thread.join, PATIENCE)
        self._stack.callback(service.stop)
        return service, thread

    def worker(self, name: str) -> AmqpWorkerTransport:
        """A worker's connection, after its hello."""
        transport = AmqpWorkerTransport(self.config, self.topology, worker=name)
        self._stack.callback(transport.close)
        transport.open(lambda _item: None, wait=PATIENCE)
        hello = Outgoing(body=encode(Hello(run=self.name, worker=name, incarnation="i")))
        wait_for(lambda: transport.control(hello).exception(PATIENCE) is None, PATIENCE, what="a hello")
        return transport

    def send(self, transport: AmqpWorkerTransport, worker: str, seq: int, value: float) -> None:
        """An update of ``worker``, confirmed."""
        update = update_of({"w": vector(value, 0)}, run=self.name, worker=worker, seq=seq)
        message = Outgoing(body=encode(update), message_id=str(update.id), headers={"worker": worker})
        transport.publish(message).result(PATIENCE)

    def beat(self, transport: AmqpWorkerTransport, worker: str, seconds: float) -> None:
        """A heartbeat of ``worker``."""
        facts: Any = {"state": "training", "version": 0, "confirmed": 1, "seconds": seconds, "incarnation": "i"}
        event = Event(run=self.name, kind=EventKind.HEARTBEAT, source=worker, time=time.time(), data=facts)
        transport.event("heartbeat", Outgoing(body=encode(event)))

    @contextmanager
    def watched(self, **more: str) -> Iterator[Watching]:
        """A watch, connected."""
        config = BrokerConfig.model_validate({**dict(self.config), **more})
        with Watching(config, self.name) as watch:
            watch.await_connection(PATIENCE)
            yield watch


@pytest.fixture
def run(tmp_path: Path, node: PrivateNode, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    names = itertools.count(1)
    # In one process they would have one name.
    monkeypatch.setattr(status, "own_name", lambda: f"host/{next(names)}")
    with ExitStack() as stack:
        yield Run(tmp_path, node, stack)


def test_everything_is_seen_with_the_management_api(run: Run, node: PrivateNode, tmp_path: Path) -> None:
    first, _ = run.aggregator()
    wait_for(lambda: first.leads, PATIENCE, what="who leads")
    run.aggregator()
    good, bad = run.worker("good"), run.worker("bad")
    run.send(good, "good", 0, 1.0)
    for seq in range(3):
        run.send(bad, "bad", seq, np.nan)

    with run.watched() as watch:

        def is_all_there() -> bool:
            run.beat(good, "good", 0.5)
            run.beat(bad, "bad", 2.0)
            seen = watch.monitor.snapshot()
            return seen["dead_letters"] == 3 and len(seen["aggregators"]) >= 2 and seen["version"] == 1

        wait_for(is_all_there, PATIENCE, what="all of the run")

    with running(tmp_path, "status", "--watch", "--run", run.name, url=node.url, environment=_api(node)) as live:
        live.wait_log("aggregator host/1 leads, epoch 1")
        assert live.terminate() == 0

    done = fedmq(tmp_path, "status", "--json", "--run", run.name, url=node.url, environment=_api(node))
    assert (done.code, done.err) == (0, ""), done
    seen = json.loads(done.out)
    jsonschema.Draft202012Validator(SCHEMA).validate(seen)
    assert (seen["state"], seen["version"], seen["epoch"], seen["updates"]) == ("running", 1, 1, 1)
    assert [(one["name"], one["active"]) for one in seen["aggregators"]] == [("host/1", True), ("host/2", False)]
    assert (seen["rejected"], seen["dead_letters"], seen["alarms"]) == ({"not-finite": 3}, 3, [])
    workers = {worker["name"]: worker for worker in seen["workers"]}
    assert (workers["good"]["updates"], workers["good"]["seconds"], workers["good"]["remarks"]) == (1, 0.5, [])
    assert workers["bad"]["remarks"][0] == "3 rejected: not-finite"
    assert any(remark.startswith("slow: 4.0 times") for remark in workers["bad"]["remarks"])
    queues = {queue["purpose"]: queue for queue in seen["queues"]}
    assert queues["dead letters"]["bytes"] > 0
    assert queues["whose turn"]["consumers"] == 2
    assert seen["disk"]["checkpoints"] >= 1
    assert seen["disk"]["free"] > 0
    assert seen["missing"] == []


def test_without_the_management_api_the_rest_is_seen_and_what_is_missing_is_said(
    run: Run, node: PrivateNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watching, "NEWEST_AFTER", 0.1)
    service, thread = run.aggregator()
    good = run.worker("good")
    run.send(good, "good", 0, 1.0)
    # As somebody who may look and nothing else; docs/operating.md has these permissions.
    own = rf"^fedmq\.{run.name}\.watch\..*$"
    url = add_user(node, configure=own, write=own, read=rf"^fedmq\.(events|{run.name}\..*)$")
    with run.watched(management_url=NO_API, url=url) as watch:
        assert watch.monitor.wait_complete(PATIENCE)
        wait_for(lambda: watch.monitor.snapshot()["version"] == 1, PATIENCE, what="version 1")
        wait_for(lambda: watch.monitor.snapshot()["queues"], PATIENCE, what="queues by AMQP")
        seen = watch.monitor.snapshot()
        jsonschema.Draft202012Validator(SCHEMA).validate(seen)
        queues = {queue["purpose"]: (queue["ready"], queue["bytes"], queue["consumers"]) for queue in seen["queues"]}
        assert queues["whose turn"] == (0, None, 1)
        assert (seen["dead_letters"], seen["alarms"]) == (0, None)
        (missing,) = seen["missing"]
        assert missing.startswith("bytes and unacked messages in queues, standbys, the broker's alarms: ")

        # When it leaves, that is seen at once, and its last figures stay
        service.stop()
        thread.join(PATIENCE)
        wait_for(lambda: watch.monitor.state == "silent", PATIENCE, what="that it has left")
        assert watch.monitor.snapshot()["workers"][0]["updates"] == 1

    # Who comes then is told what the broker knows
    with run.watched(management_url=NO_API, url=url) as watch:
        wait_for(lambda: watch.monitor.snapshot()["epoch"] == 1, PATIENCE, what="the newest version in the stream")
        assert (watch.monitor.snapshot()["state"], watch.monitor.snapshot()["version"]) == ("waiting", 1)
    more = {"FEDMQ_BROKER_MANAGEMENT_URL": NO_API}
    done = fedmq(tmp_path, "status", "--wait", "0.2", "--run", run.name, url=node.url, environment=more)
    assert done.code == 0, done
    assert "none is heard" in done.out
    assert ["round", "1"] in [line.split() for line in done.out.splitlines()]
    assert "not known: no aggregator has been heard" in done.out


def test_a_run_that_is_over_is_told_by_its_last_version(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "NEWEST_AFTER", 0.1)
    transport = AmqpAggregatorTransport(run.config, run.topology, model_bytes=8, prefetch=10)
    transport.open(lambda _item: None, wait=PATIENCE)
    for version, done in ((6, 0), (7, 1)):
        headers: dict[str, str | int] = {"epoch": 3, "version": version, "attempt": 0, "done": done}
        transport.broadcast(Outgoing(body=b"x", message_id=str(version), headers=headers)).result(PATIENCE)
    transport.close()
    with run.watched() as watch:
        wait_for(lambda: watch.monitor.state == "done", PATIENCE, what="that it is done")
        seen = watch.monitor.snapshot()
        assert (seen["version"], seen["epoch"]) == (7, 3)


def test_a_run_that_nobody_declared_and_a_broker_that_refuses_are_told(tmp_path: Path, node: PrivateNode) -> None:
    done = fedmq(tmp_path, "status", "--run", "nobody", "--wait", "0.2", url=node.url, environment=_api(node))
    assert_one_message(done, 4, "no aggregator has ever declared run 'nobody'", "--broker")

    url = add_user(node, configure="^$", write="^$", read="^$")
    done = fedmq(tmp_path, "status", "--run", "nobody", "--wait", "0.2", url=url, environment=_api(node))
    assert_one_message(done, 4, "user-")


def _api(node: PrivateNode) -> dict[str, str]:
    return {"FEDMQ_BROKER_MANAGEMENT_URL": node.management_url}
