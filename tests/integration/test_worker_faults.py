"""Worker processes while the aggregator is away, a queue is full, the broker dies or training lets nothing else run."""

from __future__ import annotations

import json
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from tests.chaos.judge import Knowledge, judge
from tests.support.node import GivenNode, admin_of, channel, ready
from tests.support.proxy import Direction, Proxy
from tests.support.site import Site
from tests.support.tasks import HELD_SECONDS
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

Process = subprocess.Popen[bytes]
LONG = 120.0
WORKERS = 2


@contextmanager
def site(folder: Path, node: PrivateNode, **settings: Mapping[str, object]) -> Iterator[Site]:
    """A run that is initialised."""
    with Site(folder, node.url, workers=WORKERS, settings=settings, prefix="faults") as place:
        place.initialise()
        yield place


def started(place: Site) -> Process:
    """An aggregator, once it leads."""
    before = place.log().count("leads run")
    aggregator = place.command("aggregator")
    wait_for(lambda: place.log().count("leads run") > before, LONG, what="an aggregator that leads")
    return aggregator


def wait_log(place: Site, text: str, log: str = "log", times: int = 1) -> None:
    wait_for(lambda: place.log(log).count(text) >= times, LONG, what=f"{text!r} in {log}")


def end(process: Process, place: Site) -> None:
    process.send_signal(signal.SIGTERM)
    assert process.wait(LONG) == 0, place.log()[-3000:]


def finish(place: Site, node: PrivateNode, aggregator: Process, *workers: Process) -> None:
    """All leave, the workers first; what was confirmed is in the model, once, and in the history."""
    for worker in workers:
        end(worker, place)
    wait_for(lambda: ready(node, place.topology.updates) == 0, LONG, what="an empty queue")
    end(aggregator, place)
    knowledge = Knowledge()
    for index in range(WORKERS):
        knowledge.collect(place.outbox(index))
    verdict = judge(place.store, place.results / "history.jsonl", knowledge)
    verdict.require_good()
    assert verdict.confirmed > 0
    assert ready(node, place.topology.dead) == 0


def next_seq(place: Site, index: int) -> int:
    outbox = place.outbox(index)
    return int(json.loads(outbox.read_text())["next_seq"]) if outbox.exists() else 0


# ------------------------------------------------------------------------------------------------ nobody there


def test_workers_publish_what_they_may_for_a_version_and_wait_for_an_aggregator_that_is_away(
    node: PrivateNode, tmp_path: Path
) -> None:
    allowed = 3
    with site(tmp_path, node, aggregator={"updates_per_version": allowed}) as place:
        end(started(place), place)

        # When workers come and go on under their own connections
        workers = [place.worker(index, log=f"w{index}") for index in range(WORKERS)]
        wait_for(lambda: ready(node, place.topology.updates) == WORKERS * allowed, LONG, what="all allowed updates")
        node.ctl("close_all_connections", "a test")
        for index in range(WORKERS):
            wait_log(place, "connected to", f"w{index}", times=3)
            wait_log(place, f"/{allowed - 1} confirmed", f"w{index}")

        # Then that is all
        assert ready(node, place.topology.updates) == WORKERS * allowed
        assert [next_seq(place, index) for index in range(WORKERS)] == [allowed] * WORKERS

        # And the next version makes them go on
        aggregator = started(place)
        wait_for(lambda: place.version() >= 4, LONG, what="four versions")
        finish(place, node, aggregator, *workers)


def test_workers_wait_for_room_in_a_full_queue(node: PrivateNode, tmp_path: Path) -> None:
    admin, path = admin_of(node), "/policies/%2F/full-updates"
    with site(tmp_path, node, aggregator={"updates_per_version": 50}) as place:
        end(started(place), place)
        limit = {"max-length": 3, "overflow": "reject-publish"}
        admin.put(path, {"pattern": f"^{place.topology.updates}$", "definition": limit, "apply-to": "queues"})
        try:
            # When workers meet a queue that takes no more
            workers = [place.worker(index, log=f"w{index}") for index in range(WORKERS)]
            for index in range(WORKERS):
                wait_log(place, "is published again: PublishRefused", f"w{index}")
            assert ready(node, place.topology.updates) >= 3

            # Then they go on once somebody empties it
            aggregator = started(place)
            wait_for(lambda: place.version() >= 4, LONG, what="four versions")
            finish(place, node, aggregator, *workers)
        finally:
            admin._request("DELETE", path)


# ------------------------------------------------------------------------------------------------- the broker


@pytest.mark.slow
def test_a_broker_that_dies_and_one_that_stops_come_back_with_everything(node: PrivateNode, tmp_path: Path) -> None:
    with site(tmp_path, node) as place:
        aggregator = started(place)
        workers = [place.worker(index) for index in range(WORKERS)]
        for fall in (node.kill, node.stop):
            seen = place.version()
            wait_for(lambda seen=seen: place.version() >= seen + 2, LONG, what="two more versions")  # type: ignore[misc]
            try:
                fall()
            finally:
                node.start()
        seen = place.version()
        wait_for(lambda: place.version() >= seen + 2, LONG, what="two more versions")
        finish(place, node, aggregator, *workers)


def test_a_run_goes_on_whatever_is_deleted_under_it(node: PrivateNode, tmp_path: Path) -> None:
    with site(tmp_path, node) as place:
        aggregator = started(place)
        workers = [place.worker(index) for index in range(WORKERS)]
        topology = place.topology
        for kind, name in (
            ("queue", topology.updates),
            ("queue", topology.parameters),
            ("exchange", topology.parameters),
            ("exchange", "fedmq.updates"),
            ("exchange", "fedmq.events"),
            ("queue", topology.turn),
        ):
            seen = place.version()
            wait_for(lambda seen=seen: place.version() >= seen + 2, LONG, what=f"progress before {name}")  # type: ignore[misc]
            before = place.log().count(f"somebody has deleted {kind} {name}")
            with channel(node) as inside:
                getattr(inside, f"{kind}_delete")(name)
            wait_log(place, f"somebody has deleted {kind} {name}", times=before + 1)
        seen = place.version()
        wait_for(lambda: place.version() >= seen + 2, LONG, what="progress after all")
        # What was in the deleted queue is lost; everything else is there once.
        for worker in workers:
            end(worker, place)
        wait_for(lambda: ready(node, topology.updates) == 0, LONG, what="an empty queue")
        end(aggregator, place)
        told = Counter(
            (u["worker"], u["incarnation"], u["seq"])
            for line in place.history
            if line["kind"] == "version"
            for u in line["updates"]
        )
        assert max(told.values()) == 1


def test_a_worker_whose_update_went_with_a_deleted_queue_is_asked_again(node: PrivateNode, tmp_path: Path) -> None:
    settings: dict[str, Mapping[str, object]] = {
        "aggregator": {"buffer_size": 1, "learning_rate": 1.0, "updates_per_version": 1},
        "worker": {"delay": 0.5},
    }
    with Proxy.to(node.url) as proxy, site(tmp_path, node, **settings) as place:
        aggregator = place.command("aggregator", url=proxy.url(node.url))
        worker = place.worker(0)
        wait_for(lambda: place.version() >= 1, LONG, what="a version")

        # Given an update that the broker has confirmed and that the aggregator never got
        proxy.hole(Direction.DOWN)
        seen = place.version()
        wait_for(lambda: place.confirmed(0) > seen, LONG, what="one more confirmed update")
        with channel(node) as inside:
            inside.queue_delete(place.topology.updates)
        proxy.cut()
        proxy.heal()

        # Then the run does not wait for it for ever, though the worker has published all that it may
        wait_for(lambda: place.version() >= seen + 2, LONG, what="two more versions")
        end(worker, place)
        wait_for(lambda: ready(node, place.topology.updates) == 0, LONG, what="an empty queue")
        end(aggregator, place)


# ------------------------------------------------------------------------------------------------ the training


@pytest.mark.slow
def test_a_training_that_lets_nothing_else_run_costs_a_connection_and_no_update(
    node: PrivateNode, tmp_path: Path
) -> None:
    settings: dict[str, Mapping[str, object]] = {
        "broker": {"heartbeat": 5},
        "aggregator": {"worker_timeout": 5.0, "buffer_size": 1, "learning_rate": 1.0},
        "worker": {"task": "tests.support.tasks:Holding", "max_updates": 1},
    }
    with site(tmp_path, node, **settings) as place:
        aggregator = started(place)

        worker = place.worker(0, log="w0")

        # It is longer than what RabbitMQ takes for death
        assert worker.wait(HELD_SECONDS + LONG) == 0, place.log("w0")
        assert place.confirmed(0) == 1
        if not isinstance(node, GivenNode):  # whose log is elsewhere
            assert "missed heartbeats" in node.log
        finish(place, node, aggregator)
        assert place.version() == 1


def test_a_login_that_is_refused_is_told_once(node: PrivateNode, tmp_path: Path) -> None:
    with site(tmp_path, node) as place:
        url = node.url.replace(node.password, "wrong-secret")

        assert place.worker(0, url=url, log="w0").wait(LONG) == 4
        assert place.command("aggregator", url=url, log="agg").wait(LONG) == 4

        for log in ("w0", "agg"):
            said = place.log(log)
            assert said.count("refused the login of user") == 1, said
            assert "wrong-secret" not in said
            assert "Traceback" not in said
