"""A run of real processes: started in any order, left and joined again, ended with results that agree."""

from __future__ import annotations

import json
import tomllib
from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from aggregator.checkpoint import CheckpointStore
from aggregator.history import read_history
from broker.amqp.node import PrivateNode
from broker.topology import Topology
from fedmq.monitoring.monitor import Monitor
from fedmq.monitoring.watching import watching
from tests.support.commands import Running, fedmq, running
from tests.support.node import config_of, fresh_topology
from tests.support.tasks import Counting
from tests.support.waiting import wait_for

ROUNDS = 12

# One update from each worker and version: with a buffer of two, no round closes before both workers are there.
SETTINGS = f"""
[aggregator]
buffer_size = 2
updates_per_version = 1
learning_rate = 2.0
weighting = "uniform"
staleness = "constant"
stop_after_rounds = {ROUNDS}
worker_timeout = 60.0

[worker]
task = "tests.support.tasks:Counting"
heartbeat_seconds = 0.5
delay = 0.1
"""


class Federation:
    """A run's folder, and ways to look at it."""

    def __init__(self, folder: Path, node: PrivateNode, topology: Topology, monitor: Monitor) -> None:
        self.folder, self.url, self.run = folder, node.url, topology.run
        self.results = folder / "runs" / topology.run
        self.monitor = monitor
        (folder / "fedmq.toml").write_text(f'run = "{topology.run}"\n{SETTINGS}')

    def worker(self, index: int, name: str = "") -> AbstractContextManager[Running]:
        """Start worker ``w<index>`` on shard ``index``."""
        own = ("--name", f"w{index}", "--shard", f"{index}/8")
        return running(self.folder, "worker", *own, url=self.url, name=name or f"w{index}")

    def command(self, command: str, name: str = "") -> AbstractContextManager[Running]:
        """Start a command that has no settings of its own."""
        return running(self.folder, command, url=self.url, name=name)

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """What the history holds of one kind."""
        return [line for line in read_history(self.results / "history.jsonl") if line["kind"] == kind]

    def wait_version(self, number: int) -> None:
        """Wait until a version is in the history."""
        wait_for(lambda: len(self.lines("version")) >= number, 60, what=f"version {number}")

    def outbox(self, worker: str) -> dict[str, Any]:
        """What a worker has on disk."""
        content: dict[str, Any] = json.loads((self.results / "workers" / worker / "outbox.json").read_text())
        return content


@pytest.fixture
def federation(tmp_path: Path, node: PrivateNode) -> Iterator[Federation]:
    topology = fresh_topology()
    with watching(config_of(node), topology.run) as monitor:
        yield Federation(tmp_path, node, topology, monitor)


@pytest.mark.broker
def test_any_order_of_start_and_stop_leads_to_results_that_agree(federation: Federation) -> None:
    with ExitStack() as stack:
        # Given a worker and an evaluator that come before there is anything to come to
        w0 = stack.enter_context(federation.worker(0))
        w0.wait_log("no aggregator has declared run")
        evaluator = stack.enter_context(federation.command("evaluate"))
        evaluator.wait_log("no aggregator has declared run")

        # When the run is made, and its aggregator stopped while one of two updates is in the buffer
        assert fedmq(federation.folder, "init", url=federation.url).code == 0
        with federation.command("aggregator", "first") as first:
            wait_for(lambda: federation.monitor.snapshot()["buffer"]["fill"] == 1, 60, what="an update in the buffer")
            assert first.terminate() == 0

        # Then that update is in the checkpoint
        partial = CheckpointStore(federation.results / "checkpoints", federation.run).load()
        assert [entry.id.worker for entry in partial.entries] == ["w0"]
        assert (partial.version, partial.epoch, partial.accumulator.count) == (0, 1, 1)

        # When the aggregator is started again and a second worker joins
        aggregator = stack.enter_context(federation.command("aggregator"))
        with federation.worker(1, "w1-first") as w1:
            federation.wait_version(3)

            # Then it may leave at any time
            assert w1.terminate() == 0
        left = federation.outbox("w1")
        assert left["confirmed"] > 0

        # And come back under its name, as another incarnation
        again = stack.enter_context(federation.worker(1))
        assert [process.wait() for process in (aggregator, evaluator, w0, again)] == [0, 0, 0, 0]

    assert_results_agree(federation)
    versions = federation.lines("version")
    entries = [entry for version in versions for entry in version["updates"]]
    assert partial.entries[0].id.seq in {e["seq"] for e in versions[0]["updates"] if e["worker"] == "w0"}
    incarnations = {e["incarnation"] for e in entries if e["worker"] == "w1"}
    assert incarnations == {left["incarnation"], federation.outbox("w1")["incarnation"]}
    assert [line["epoch"] for line in federation.lines("start")] == [1, 2]

    # A worker that comes when all is over, with nobody there but the broker, gets the last version and leaves.
    with federation.worker(2) as late:
        assert late.wait() == 0
        assert f"done: 0 updates confirmed, newest version {ROUNDS}" in late.log


def assert_results_agree(federation: Federation) -> None:
    """Summary, history, model and settings tell the same story."""
    summary = json.loads((federation.results / "summary.json").read_text())
    versions = federation.lines("version")
    entries = [entry for version in versions for entry in version["updates"]]
    updates = summary["updates"]

    assert (summary["run"], summary["outcome"], summary["rounds"]) == (federation.run, "done", ROUNDS)
    assert [line["version"] for line in versions] == list(range(1, ROUNDS + 1))
    assert [line["before"] for line in versions[1:]] == [line["after"] for line in versions[:-1]]
    ids = [(e["worker"], e["incarnation"], e["seq"]) for e in entries]
    assert len(set(ids)) == len(ids)
    assert updates["applied"] == len(ids) == 2 * ROUNDS
    assert updates["confirmed"] == updates["applied"] + sum(updates["rejected_by_reason"].values())
    assert updates["rejected"] == sum(updates["rejected_by_reason"].values())

    model = Counting().model()
    model.load_state_dict(load_file(federation.results / "model.safetensors"), strict=True)
    counts = Counter(int(e["worker"][1:]) for e in entries)
    assert model.state_dict()["cells"].tolist() == [counts[index] for index in range(8)]
    last = max(federation.lines("evaluation"), key=lambda line: line["version"])
    assert summary["evaluated_version"] == last["version"] == ROUNDS
    assert summary["evaluation"]["applied"] == last["metrics"]["applied"] == len(ids)

    text = (federation.results / "config.toml").read_text()
    settings = tomllib.loads(text)
    assert (settings["run"], settings["aggregator"]["stop_after_rounds"]) == (federation.run, ROUNDS)
    assert federation.url not in text
    assert "***" in settings["broker"]["url"]
