"""Real processes, killed with real signals. Judged by the ledger alone: what workers know to be confirmed is in
the model, each update once.

The task counts: update n of worker i adds 1 to cell i, so the parameters say how many were applied.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from aggregator.checkpoint import CheckpointStore
from aggregator.core.ledger import Ledger
from aggregator.history import read_history
from broker.amqp.node import PrivateNode
from tests.support.node import fresh_topology, ready
from tests.support.waiting import wait_for

ROOT = Path(__file__).parents[2]
WORKERS = 3
UPDATES = 24
BUFFER = 4

pytestmark = pytest.mark.broker


class Site:
    """A folder with a run in it, and the processes that work there."""

    def __init__(self, folder: Path, node: PrivateNode) -> None:
        self.folder, self.node = folder, node
        self.topology = fresh_topology("kill")
        self.store = CheckpointStore(folder / "runs" / self.topology.run / "checkpoints", self.topology.run)
        self.processes: list[subprocess.Popen[bytes]] = []
        (folder / "fedmq.toml").write_text(
            f'run = "{self.topology.run}"\n'
            f'[aggregator]\nbuffer_size = {BUFFER}\nlearning_rate = {BUFFER}.0\nstaleness = "constant"\n'
            f"max_staleness = 1000\ncommit_count = 2\nlinger = 1.0\n"
            f'[worker]\ntask = "tests.support.tasks:Counting"\nmax_updates = {UPDATES}\ndevice = "cpu"\n'
            "heartbeat_seconds = 0.5\ndelay = 0.02\n[broker]\nheartbeat = 10\n"
        )

    def command(self, *arguments: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEDMQ_BROKER_URL": self.node.url}
        with (self.folder / "log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "fedmq", *arguments], cwd=self.folder, env=environment, stdout=log, stderr=log
            )
        self.processes.append(process)
        return process

    def worker(self, index: int) -> subprocess.Popen[bytes]:
        return self.command("worker", "--name", f"w{index}", "--shard", f"{index}/{WORKERS}")

    def confirmed(self, index: int) -> int:
        outbox = self.folder / "runs" / self.topology.run / "workers" / f"w{index}" / "outbox.json"
        return int(json.loads(outbox.read_text())["confirmed"]) if outbox.exists() else 0

    @property
    def history(self) -> list[dict[str, object]]:
        return list(read_history(self.store.folder.parent / "history.jsonl"))

    def version(self) -> int:
        return sum(line["kind"] == "version" for line in self.history)

    def epochs(self) -> list[object]:
        return [line["epoch"] for line in self.history if line["kind"] == "start"]

    def log(self) -> str:
        return (self.folder / "log").read_text()


@contextmanager
def site(folder: Path, node: PrivateNode) -> Iterator[Site]:
    place = Site(folder, node)
    try:
        yield place
    finally:
        for process in place.processes:
            if process.poll() is None:
                process.kill()
            process.wait()


def counts(place: Site) -> list[int]:
    """Applied updates by worker: in the parameters and in the partial round."""
    snapshot = place.store.load()
    partial = snapshot.accumulator.tensors.get("cells", np.zeros(8))
    return [int(n) for n in snapshot.parameters["cells"] + partial][:WORKERS]


def finish(place: Site, aggregator: subprocess.Popen[bytes]) -> None:
    """Everything that was confirmed is taken in; then the aggregator is asked to stop."""
    wait_for(
        lambda: ready(place.node, place.topology.updates) == 0 and sum(counts(place)) >= WORKERS * UPDATES,
        60,
        what=f"{WORKERS * UPDATES} applied updates; there are {counts(place)}; the log:\n{place.log()[-3000:]}",
    )
    aggregator.send_signal(signal.SIGTERM)
    assert aggregator.wait(30) == 0, place.log()[-3000:]


def test_an_aggregator_killed_again_and_again_neither_loses_nor_repeats_an_update(
    node: PrivateNode, tmp_path: Path
) -> None:
    with site(tmp_path, node) as place:
        assert place.command("init").wait(60) == 0, place.log()
        aggregator = place.command("aggregator")
        workers = [place.worker(index) for index in range(WORKERS)]

        for kill in range(3):
            wait_for(lambda seen=2 * (kill + 1): place.version() >= seen, 60, what="progress")  # type: ignore[misc]
            wait_for(lambda epoch=kill + 1: place.epochs()[-1:] == [epoch], 60, what="its start")  # type: ignore[misc]
            aggregator.kill()
            aggregator.wait()
            aggregator = place.command("aggregator")
        for worker in workers:
            assert worker.wait(90) == 0, place.log()[-3000:]
        finish(place, aggregator)

        assert [place.confirmed(index) for index in range(WORKERS)] == [UPDATES] * WORKERS
        assert counts(place) == [UPDATES] * WORKERS
        ledger = list(Ledger(place.store.load().ledger))
        assert sorted((i.worker, i.seq) for i in ledger) == [
            (f"w{index}", seq) for index in range(WORKERS) for seq in range(UPDATES)
        ]
        told = [(u["worker"], u["seq"]) for line in place.history if line["kind"] == "version" for u in line["updates"]]  # type: ignore[attr-defined]
        assert len(told) == len(set(told)) == place.version() * BUFFER
        assert place.epochs() == [1, 2, 3, 4]
        assert ready(node, place.topology.dead) == 0


def test_a_worker_killed_again_and_again_never_uses_an_id_twice(node: PrivateNode, tmp_path: Path) -> None:
    with site(tmp_path, node) as place:
        assert place.command("init").wait(60) == 0, place.log()
        aggregator = place.command("aggregator")
        others = [place.worker(index) for index in range(1, WORKERS)]

        victim = place.worker(0)
        for kill in range(3):
            wait_for(lambda goal=kill + 2: place.confirmed(0) >= goal, 60, what="confirmed updates")  # type: ignore[misc]
            victim.kill()
            victim.wait()
            victim = place.worker(0)
        assert victim.wait(90) == 0, place.log()[-3000:]
        for worker in others:
            assert worker.wait(90) == 0
        wait_for(lambda: ready(node, place.topology.updates) == 0, what="an empty queue")
        aggregator.send_signal(signal.SIGTERM)
        assert aggregator.wait(30) == 0

        applied, confirmed = counts(place), [place.confirmed(index) for index in range(WORKERS)]
        assert applied[1:] == confirmed[1:] == [UPDATES, UPDATES]
        # Between the broker's confirm and the worker's own note a kill leaves one update undecided, each time.
        assert confirmed[0] <= applied[0] <= confirmed[0] + 3
        ids = list(Ledger(place.store.load().ledger))
        assert len({i.incarnation for i in ids if i.worker == "w0"}) == 1
        assert len(ids) == len(set(ids)) == sum(applied)
