"""Real processes, killed with real signals. Judged by the ledger alone: what workers know to be confirmed is in
the model, each update once.

The task counts: update n of worker i adds 1 to cell i, so the parameters say how many were applied.
"""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import numpy as np
import pytest

from aggregator.core.ledger import Ledger
from broker.amqp.node import PrivateNode
from tests.support.node import ready
from tests.support.site import BUFFER, Site
from tests.support.waiting import wait_for

WORKERS = 3
UPDATES = 24

pytestmark = pytest.mark.broker


def site(folder: Path, node: PrivateNode) -> Site:
    return Site(folder, node.url, workers=WORKERS, settings={"worker": {"max_updates": UPDATES}}, prefix="kill")


def counts(place: Site) -> list[int]:
    """Applied updates by worker: in the parameters and in the partial round."""
    snapshot = place.store.load()
    partial = snapshot.accumulator.tensors.get("cells", np.zeros(8))
    return [int(n) for n in snapshot.parameters["cells"] + partial][:WORKERS]


def finish(place: Site, node: PrivateNode, aggregator: subprocess.Popen[bytes]) -> None:
    """Everything that was confirmed is taken in; then the aggregator is asked to stop."""
    wait_for(
        lambda: ready(node, place.topology.updates) == 0 and sum(counts(place)) >= WORKERS * UPDATES,
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
        finish(place, node, aggregator)

        assert [place.confirmed(index) for index in range(WORKERS)] == [UPDATES] * WORKERS
        assert counts(place) == [UPDATES] * WORKERS
        ledger = list(Ledger(place.store.load().ledger))
        assert sorted((i.worker, i.seq) for i in ledger) == [
            (f"w{index}", seq) for index in range(WORKERS) for seq in range(UPDATES)
        ]
        told = [(u["worker"], u["seq"]) for line in place.history if line["kind"] == "version" for u in line["updates"]]
        assert len(told) == len(set(told)) == place.version() * BUFFER
        assert place.epochs() == [1, 2, 3, 4]
        assert ready(node, place.topology.dead) == 0


def test_a_worker_killed_again_and_again_never_uses_an_id_twice(node: PrivateNode, tmp_path: Path) -> None:
    with site(tmp_path, node) as place:
        assert place.command("init").wait(60) == 0, place.log()
        aggregator = place.command("aggregator")
        others = [place.worker(index) for index in range(1, WORKERS)]

        lives: list[tuple[str, int]] = []
        victim = place.worker(0)
        for _ in range(3):
            wait_for(lambda: place.life(0)[0] not in dict(lives) and place.confirmed(0) >= 2, 60, what="its updates")
            victim.kill()
            victim.wait()
            lives.append(place.life(0))
            victim = place.worker(0)
        assert victim.wait(90) == 0, place.log()[-3000:]
        lives.append(place.life(0))
        for worker in others:
            assert worker.wait(90) == 0
        wait_for(lambda: ready(node, place.topology.updates) == 0, what="an empty queue")
        aggregator.send_signal(signal.SIGTERM)
        assert aggregator.wait(30) == 0

        applied, confirmed = counts(place), sum(dict(lives).values())
        assert applied[1:] == [UPDATES, UPDATES]
        assert lives[-1][1] == UPDATES
        # Between the broker's confirm and the worker's own note a kill leaves one update undecided, each time.
        assert confirmed <= applied[0] <= confirmed + 3
        ids = list(Ledger(place.store.load().ledger))
        assert {i.incarnation for i in ids if i.worker == "w0"} == set(dict(lives))
        assert len(ids) == len(set(ids)) == sum(applied)
        # What the killed lives had confirmed was told by the next ones.
        summary = json.loads((place.results / "summary.json").read_text())["updates"]
        assert (summary["applied"], summary["confirmed"]) == (sum(applied), confirmed + 2 * UPDATES)
