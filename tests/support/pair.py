"""A run's folder, aggregators and a worker as processes, for tests of who leads and of commands."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from aggregator.checkpoint import CheckpointStore
from aggregator.core.ledger import Ledger
from aggregator.history import read_history
from broker.amqp.node import PrivateNode
from broker.topology import Topology
from tests.support.commands import Running, fedmq, running
from tests.support.node import fresh_topology, ready
from tests.support.waiting import wait_for

__all__ = ["Pair"]

SETTINGS = """
[broker]
heartbeat = 5
[aggregator]
buffer_size = 2
learning_rate = 2.0
staleness = "constant"
max_staleness = 100000
linger = 1.0
[worker]
task = "tests.support.tasks:Counting"
heartbeat_seconds = 0.5
delay = 0.05
"""


class Pair:
    """A run's folder with two aggregators and a worker."""

    def __init__(self, folder: Path, node: PrivateNode) -> None:
        self.folder, self.node = folder, node
        self.topology: Topology = fresh_topology("pair")
        (folder / "fedmq.toml").write_text(f'run = "{self.topology.run}"\n{SETTINGS}')
        self.results = folder / "runs" / self.topology.run
        self.stack = ExitStack()
        assert fedmq(folder, "init", url=node.url).code == 0

    def start(self, command: str, name: str, *more: str) -> Running:
        return self.stack.enter_context(running(self.folder, command, *more, url=self.node.url, name=name))

    def lines(self, kind: str) -> list[dict[str, Any]]:
        return [line for line in read_history(self.results / "history.jsonl") if line["kind"] == kind]

    def epochs(self) -> list[int]:
        return [line["epoch"] for line in self.lines("start")]

    def version(self) -> int:
        return max((line["version"] for line in self.lines("version")), default=0)

    def wait_progress(self, what: str) -> None:
        seen = self.version()
        wait_for(lambda: self.version() >= seen + 2, 60, what=f"two more versions {what}")

    def finish(self, *aggregators: Running, worker: Running) -> None:
        """Stop everything; every confirmed update is in the model, once."""
        assert worker.terminate() == 0, worker.log
        wait_for(lambda: ready(self.node, self.topology.updates) == 0, 60, what="an empty queue")
        for aggregator in aggregators:
            assert aggregator.terminate() == 0, aggregator.log
        snapshot = CheckpointStore(self.results / "checkpoints", self.topology.run).load()
        partial = snapshot.accumulator.tensors.get("cells")
        total = snapshot.parameters["cells"] + (0 if partial is None else partial)
        ids = list(Ledger(snapshot.ledger))
        assert total[0] == len(ids) == len(set(ids))
        assert sum(1 for _ in ids) >= sum(sum(c.values()) for c in snapshot.confirmed.values())
        assert ready(self.node, self.topology.dead) == 0
