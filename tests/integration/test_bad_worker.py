"""A worker with a valid account that does whatever it can: it is refused unread and named, and the run goes on."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import pika
import pytest

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core.allowance import BAD, STALLED
from aggregator.history import read_history
from aggregator.service import AggregatorService
from broker.admin import Admin
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.topology import EVENTS, UPDATES
from broker.wire import encode, encode_in_chunks
from tests.attacks.corpus import MODEL, Author
from tests.support.node import channel, config_of, fresh_topology, ready
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

FLOOD = 600


class Bench:
    """A run, a good worker's account and a bad one's, which are called as their workers."""

    def __init__(self, node: PrivateNode, folder: Path, **settings: Any) -> None:
        self.node, self.folder, self.topology = node, folder, fresh_topology("bad")
        self.store = CheckpointStore(folder / "checkpoints", self.topology.run)
        self.store.create(MODEL, {"w": np.zeros(30_000, np.float32), "v": np.zeros(2, np.float32)}, now=0.0)
        config = AggregatorConfig(buffer_size=1, linger=0.0, max_staleness=10**6, **settings)
        self.service = AggregatorService(folder=folder, run=self.topology.run, config=config, store=self.store)
        transport = AmqpAggregatorTransport(
            config_of(node), self.topology, model_bytes=MODEL.nbytes, prefetch=config.prefetch(MODEL.nbytes)
        )
        self.thread = threading.Thread(target=self.service.run, args=(transport,), daemon=True)
        self.thread.start()
        self.names = {name: f"{name}-{self.topology.run[-8:]}" for name in ("good", "mallory")}
        admin = Admin(node.management_url, node.user, node.password)
        for name in self.names.values():
            admin.put(f"/users/{name}", {"password": "pw", "tags": ""})
            admin.put(f"/permissions/%2F/{name}", {"configure": "", "write": r"^fedmq\.", "read": ""})

    def channel(self, name: str) -> pika.adapters.blocking_connection.BlockingChannel:
        url = self.node.url.replace(f"{quote(self.node.user)}:{quote(self.node.password)}", f"{self.names[name]}:pw")
        self.connections = [*getattr(self, "connections", []), pika.BlockingConnection(pika.URLParameters(url))]
        return self.connections[-1].channel()

    def author(self, name: str) -> Author:
        return Author(self.topology.run, self.names[name])

    def send(self, raw: Any, name: str, body: bytes, *, as_: str = "", exchange: str = UPDATES, key: str = "") -> None:
        properties = pika.BasicProperties(
            delivery_mode=2, user_id=self.names[name], headers={"worker": self.names[as_ or name]}
        )
        raw.basic_publish(exchange, key or self.topology.key(self.names[as_ or name]), body, properties)

    def goes_on(self, seq: int) -> None:
        """Another good update makes another version."""
        before = self.store.load().version
        raw = self.channel("good")
        raw.confirm_delivery()
        self.send(raw, "good", encode(self.author("good").update(seq)))
        wait_for(lambda: self.store.load().version == before + 1, what="another version")

    def rejected(self) -> dict[str, dict[str, int]]:
        """What was rejected, by worker and reason, as the history has it in the end."""
        self.service.stop()
        self.thread.join(60)
        found: dict[str, dict[str, int]] = {}
        for line in read_history(self.folder / "history.jsonl"):
            for worker, counts in line.get("workers", {}).items() if line["kind"] == "rejected" else ():
                for reason, count in counts.items():
                    found.setdefault(worker, {}).setdefault(reason, 0)
                    found[worker][reason] += count
        return found

    def close(self) -> None:
        for connection in getattr(self, "connections", []):
            connection.close()
        self.service.stop()
        self.thread.join(60)


@pytest.fixture
def bench(node: PrivateNode, tmp_path: Path) -> Iterator[Callable[..., Bench]]:
    made: list[Bench] = []

    def make(**settings: Any) -> Bench:
        made.append(Bench(node, tmp_path, **settings))
        wait_for((tmp_path / "alive").exists, what="an aggregator")
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_a_flood_of_rubbish_is_refused_unread_and_not_kept(bench: Callable[..., Bench], node: PrivateNode) -> None:
    run = bench()
    raw = run.channel("mallory")
    for _ in range(FLOOD):
        run.send(raw, "mallory", b"rubbish")
    run.goes_on(0)
    wait_for(lambda: ready(node, run.topology.updates) == 0, what="an empty queue")
    letters = ready(node, run.topology.dead)
    assert BAD.burst <= letters < FLOOD / 2
    counts = run.rejected()[run.names["mallory"]]
    assert counts["malformed"] >= BAD.burst
    assert counts["malformed"] + counts["too-many"] == FLOOD


def test_whoever_speaks_in_another_s_name_answers_for_it_and_the_other_does_not(bench: Callable[..., Bench]) -> None:
    run = bench(quarantine_score=5.0)
    raw = run.channel("mallory")
    forged = encode(run.author("good").update(7, value=9.0))
    for _ in range(FLOOD):
        run.send(raw, "mallory", forged, as_="good")
    run.goes_on(7)
    counts = run.rejected()
    assert counts.keys() == {run.names["mallory"]}
    assert sum(counts[run.names["mallory"]].values()) == FLOOD
    assert float(np.asarray(run.store.load().parameters["v"])[0]) == pytest.approx(1.0)
    assert set(run.store.load().standings) == {run.names["mallory"]}


def test_the_same_update_for_ever_counts_once_and_costs_ever_less(bench: Callable[..., Bench]) -> None:
    run = bench()
    raw = run.channel("mallory")
    update = run.author("mallory").update(0)
    small = encode(replace(update, metrics={}))
    for _ in range(1500):
        run.send(raw, "mallory", small)
    wait_for(lambda: run.store.load().version == 1, what="the first version")
    run.goes_on(0)
    assert run.rejected()[run.names["mallory"]]["too-many"] > 100
    assert run.store.load().version == 2


def test_giant_messages_and_floods_of_events_are_passed_over(bench: Callable[..., Bench], node: PrivateNode) -> None:
    run = bench()
    raw = run.channel("mallory")
    run.send(raw, "mallory", bytes(3_000_000))
    key = run.topology.event_key("heartbeat", run.names["mallory"])
    for _ in range(3000):
        run.send(raw, "mallory", b"{}", exchange=EVENTS, key=key)
    run.goes_on(0)
    wait_for(lambda: ready(node, run.topology.dead) == 1, what="a dead letter")
    with channel(node) as inside:
        _, properties, body = inside.basic_get(run.topology.dead, auto_ack=True)
    assert (properties.headers["reason"], properties.headers["body"]) == ("too-large", "3000000 bytes, left out")
    assert body == b""
    assert run.rejected()[run.names["mallory"]]["too-many"] > 100


def test_what_a_worker_may_claim_and_send_is_what_the_operator_says(bench: Callable[..., Bench]) -> None:
    run = bench(max_examples=100, worker_updates_per_second=5.0)
    raw = run.channel("mallory")
    for seq in range(100):
        run.send(raw, "mallory", encode(run.author("mallory").update(seq, examples=101 if seq < 3 else 100)))
    run.goes_on(0)
    counts = run.rejected()[run.names["mallory"]]
    assert counts["too-many-examples"] == 3
    assert counts["too-many"] > 30
    assert json.dumps(counts)


def test_uploads_without_chunks_are_soon_not_waited_for(bench: Callable[..., Bench], node: PrivateNode) -> None:
    run = bench()
    raw = run.channel("mallory")
    for seq in range(12):
        update = run.author("mallory").update(seq)
        manifest, chunks = encode_in_chunks(update, str(update.id), 65_536)
        headers = {"chunks": len(chunks), "bytes": MODEL.nbytes}
        properties = pika.BasicProperties(
            delivery_mode=2, user_id=run.names["mallory"], message_id=str(update.id), headers=headers
        )
        raw.basic_publish(UPDATES, run.topology.key(run.names["mallory"]), manifest, properties)
    wait_for(lambda: ready(node, run.topology.dead) == 12, 60, what="dead letters")
    with channel(node) as inside:
        letters = [inside.basic_get(run.topology.dead, auto_ack=True)[1].headers for _ in range(12)]
    assert {letter["reason"] for letter in letters} == {"incomplete"}
    waited_for = sum("not looked for" not in letter["detail"] for letter in letters)
    assert BAD.burst / STALLED <= waited_for < 12
    run.goes_on(0)
