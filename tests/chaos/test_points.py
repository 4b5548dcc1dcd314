"""Death at each labelled point, and a life after it. Judged by the ledger."""

from __future__ import annotations

import signal
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from aggregator.core.ledger import Ledger
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpWorkerTransport
from tests.chaos import points
from tests.chaos.judge import Knowledge, Verdict, judge
from tests.support.node import config_of, ready
from tests.support.site import Site
from tests.support.tasks import Counting
from tests.support.waiting import wait_for
from worker_client.client import Summary, run_worker
from worker_client.config import WorkerConfig

pytestmark = [pytest.mark.broker, pytest.mark.slow, pytest.mark.timeout(600)]

WORKERS = 2
UPDATES = 11
PATIENCE = 180.0

#: At which passing of its label the aggregator dies, if one is not enough to have something to lose.
PASSINGS = {
    "after-claim": (1,),
    "after-fold": (1, 6),
    "after-rename": (1, 3),
    "before-fold": (5,),
    "between-acks": (2, 4),
    "mid-broadcast": (1, 3),
}


@contextmanager
def workers(site: Site, node: PrivateNode, *indices: int) -> Iterator[list[Future[Summary]]]:
    """Workers as threads of the test, which spares importing torch each time; they end after ``UPDATES``."""
    stop = threading.Event()

    def live(index: int) -> Summary:
        config = WorkerConfig(
            name=f"w{index}",
            shard=f"{index}/{WORKERS}",
            folder=site.outbox(index).parent,
            device="cpu",
            max_updates=UPDATES,
            heartbeat_seconds=0.5,
            delay=0.01,
        )
        transport = AmqpWorkerTransport(config_of(node), site.topology, worker=config.name)
        return run_worker(config, site.topology.run, transport, Counting(), stop=stop)

    with ThreadPoolExecutor(len(indices) or 1) as pool:
        try:
            yield [pool.submit(live, index) for index in indices]
        finally:
            stop.set()


def dies_at(site: Site, label: str, number: int, *command: str) -> subprocess.Popen[bytes]:
    """Start a command that kills itself there."""
    return site.command(f"{label}:{number}", *command, module=("tests.chaos.points",))


def wait_death(site: Site, process: subprocess.Popen[bytes], label: str) -> None:
    """It has died there, and not of something else."""
    code = process.wait(PATIENCE)
    assert code == -signal.SIGKILL, f"exit code {code}:\n{site.log()[-3000:]}"
    assert points.announcement(label) in site.log()


def settle(site: Site, node: PrivateNode, aggregator: subprocess.Popen[bytes], knowledge: Knowledge) -> Verdict:
    """All that is confirmed is taken in, the aggregator leaves, and the ledger is looked at."""

    def is_taken_in() -> bool:
        return ready(node, site.topology.updates) == 0 and knowledge.confirmed <= set(Ledger(site.store.load().ledger))

    try:
        wait_for(is_taken_in, PATIENCE, what="every confirmed update in the checkpoint")
    except AssertionError as error:
        raise AssertionError(f"{error}; the log:\n{site.log()[-3000:]}") from None
    aggregator.send_signal(signal.SIGTERM)
    assert aggregator.wait(PATIENCE) == 0, site.log()[-3000:]
    assert ready(node, site.topology.updates) == ready(node, site.topology.dead) == 0
    verdict = judge(site.store, site.results / "history.jsonl", knowledge)
    verdict.require_good()
    return verdict


@pytest.mark.parametrize(
    ("label", "number"), [(label, number) for label in points.AGGREGATOR for number in PASSINGS.get(label, (2,))]
)
def test_an_aggregator_that_dies_there_loses_and_doubles_nothing(
    node: PrivateNode, tmp_path: Path, label: str, number: int
) -> None:
    with Site(tmp_path, node.url, workers=WORKERS, prefix="point") as site:
        site.initialise()
        with workers(site, node, *range(WORKERS)) as living:
            # Given an aggregator that dies
            wait_death(site, dies_at(site, label, number, "aggregator"), label)

            # When another takes its place
            second = site.command("aggregator")
            assert [life.result(PATIENCE).reason for life in living] == ["limit"] * WORKERS

        # Then everything counts once
        knowledge = Knowledge()
        for index in range(WORKERS):
            knowledge.collect(site.outbox(index))
        verdict = settle(site, node, second, knowledge)
        assert verdict.confirmed == verdict.applied == WORKERS * UPDATES
        # One that died before it had said its epoch has said nothing.
        assert site.epochs()[-1] == 2


@pytest.mark.parametrize("label", points.WORKER)
def test_a_worker_that_dies_there_loses_and_doubles_nothing(node: PrivateNode, tmp_path: Path, label: str) -> None:
    with Site(tmp_path, node.url, workers=WORKERS, prefix="point") as site:
        site.initialise()
        knowledge = Knowledge()
        aggregator = site.command("aggregator")
        with workers(site, node, 1) as other:
            # Given a worker that dies
            name = ("--name", "w0", "--shard", f"0/{WORKERS}")
            wait_death(site, dies_at(site, label, 3, "worker", *name), label)
            knowledge.collect(site.outbox(0))

            # When it is started again
            with workers(site, node, 0) as again:
                assert again[0].result(PATIENCE).reason == "limit"
            assert other[0].result(PATIENCE).reason == "limit"

        # Then what was confirmed counts, and the one that nobody knows about counts at most once
        known = len(knowledge.confirmed)
        for index in range(WORKERS):
            knowledge.collect(site.outbox(index))
        verdict = settle(site, node, aggregator, knowledge)
        assert verdict.confirmed == known + WORKERS * UPDATES
        if label == "mid-training":
            # The third training goes on beside the sending of the second update, which may or may not be over.
            assert known in {1, 2}
            assert verdict.indeterminate == 2 - known
            return
        assert known == (3 if label == "after-note" else 2)
        assert verdict.indeterminate == (0 if label == "after-note" else 1)
        assert verdict.settled == (1 if label == "before-note" else 0)
