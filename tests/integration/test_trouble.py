"""A slow, a crashed and a poisoned worker in one run: each is found by each of the ways to look at it alone."""

from __future__ import annotations

import json
import re
import socket
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest

from broker.amqp.node import PrivateNode
from tests.support.commands import Running, fedmq, running
from tests.support.node import admin_of
from tests.support.waiting import wait_for

CRASHED, POISONED, SLOW = "w2", "w3", "w4"
WELL = ("w0", "w1", "w5")
#: Longer than a worker may be silent.
PATIENCE = 120.0


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody uses now."""
    for first in range(20_000, 30_000, count):
        try:
            for port in range(first, first + count):
                with socket.socket() as one:
                    one.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no ports are free")


def fetched(url: str) -> str:
    with urllib.request.urlopen(url, timeout=10) as answer:  # noqa: S310 (on this machine)
        return str(answer.read().decode())


def remarks_in(workers: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    return {str(worker["name"]): " ".join(map(str, worker["remarks"])) for worker in workers}


def are_found(remarks: Mapping[str, str]) -> bool:
    """Each is called by what is wrong with it."""
    return (
        "silent" in remarks.get(CRASHED, "")
        and "rejected" in remarks.get(POISONED, "")
        and "slow" in remarks.get(SLOW, "")
    )


def series_of(text: str, name: str) -> dict[str, float]:
    """The values of a metric by worker, summed over its other labels."""
    found: dict[str, float] = {}
    for labels, value in re.findall(rf"^{name}\{{(.*?)\}} (\S+)$", text, re.MULTILINE):
        worker = re.search(r'worker="([^"]*)"', labels)
        if worker is not None:
            found[worker[1]] = found.get(worker[1], 0.0) + float(value)
    return found


def in_the_metrics(text: str) -> bool:
    """By the queries of the dashboard's panels on slow, silent and poisoned workers."""
    seconds = series_of(text, "fedmq_aggregator_worker_training_seconds_total")
    folded = series_of(text, "fedmq_aggregator_worker_updates_folded_total")
    silent = series_of(text, "fedmq_aggregator_worker_silent")
    rejected = series_of(text, "fedmq_aggregator_worker_updates_rejected_total")
    pace = {worker: seconds[worker] / count for worker, count in folded.items() if count and worker in seconds}
    return (
        bool(pace)
        and max(pace, key=lambda worker: pace[worker]) == SLOW
        and [worker for worker, value in silent.items() if value] == [CRASHED]
        and bool(rejected)
        and max(rejected, key=lambda worker: rejected[worker]) == POISONED
    )


def in_the_admin_ui(node: PrivateNode, run: str) -> bool:
    """Who has connections, how much each has published, and whose are the dead letters."""
    admin = admin_of(node)
    names = [str(one["client_properties"].get("connection_name", "")) for one in admin.connections()]
    here = {match[1] for name in names if (match := re.match(rf"fedmq worker (\S+) · run {run} · publish", name))}
    dead = [queue for queue in admin.queues() if queue["name"] == f"fedmq.{run}.dead"]
    return here == {*WELL, POISONED, SLOW} and bool(dead) and int(dead[0].get("messages", 0)) > 0


def in_the_status(folder: Path, run: str, node: PrivateNode) -> bool:
    """By ``fedmq status``."""
    status = fedmq(folder, "status", "--run", run, "--json", url=node.url)
    assert status.code == 0, status
    return are_found(remarks_in(json.loads(status.out)["workers"]))


def page_of(demo: Running) -> str:
    found = re.search(r"live page while this runs: (\S+)", demo.log)
    assert found is not None, demo.log
    return found[1]


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.timeout(500)
def test_three_workers_in_trouble_are_found_by_each_way_to_look(tmp_path: Path, node: PrivateNode) -> None:
    run, port = "trouble", free_ports(8)
    more = (
        "--set",
        "dashboard.port=0",
        "--set",
        f"metrics.port={port}",
        "--rounds",
        "100000",
        "--set",
        "aggregator.worker_timeout=6",
    )
    with running(tmp_path, "demo", "--trouble", "--run", run, *more, url=node.url) as demo:
        demo.wait_log("live page while this runs")
        page = page_of(demo)

        def on_the_page() -> bool:
            assert demo.process.poll() is None, demo.log
            return are_found(remarks_in(json.loads(fetched(f"{page}state.json"))["view"]["workers"].values()))

        wait_for(on_the_page, PATIENCE, what="all three on the page")
        wait_for(
            lambda: in_the_metrics(fetched(f"http://127.0.0.1:{port}/metrics")), PATIENCE, what="all three in metrics"
        )
        wait_for(lambda: in_the_admin_ui(node, run), PATIENCE, what="all three in the admin UI")

        # On a busy machine the others are now and then as slow as the slow one.
        wait_for(lambda: in_the_status(tmp_path, run, node), PATIENCE, what="all three in the status")
        letters = fedmq(tmp_path, "dead", "list", "--run", run, "--json", url=node.url)
        assert {letter["worker"] for letter in json.loads(letters.out)} == {POISONED}, letters.out

        assert demo.terminate() == 0, demo.log
