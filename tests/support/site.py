"""A folder with a counting run in it, and the processes that work there.

The task counts: each update of worker ``w<i>`` adds 1 to cell i, so the parameters say how many were applied.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from aggregator.checkpoint import CheckpointStore
from aggregator.history import read_history
from broker.topology import Topology
from tests.support.commands import environment_of
from tests.support.node import fresh_topology
from worker_client.loading import load_task
from worker_client.training import initial_parameters

__all__ = ["Site", "toml"]

#: With a server learning rate of the buffer's size, and no weights, the parameters are the count of updates.
BUFFER = 4
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "broker": {"heartbeat": 10},
    "aggregator": {
        "buffer_size": BUFFER,
        "learning_rate": float(BUFFER),
        "weighting": "uniform",
        "staleness": "constant",
        "max_staleness": 1_000_000,
        "commit_count": 2,
        "commit_seconds": 0.5,
        "linger": 1.0,
    },
    "worker": {
        "task": "tests.support.tasks:Counting",
        "device": "cpu",
        "heartbeat_seconds": 0.5,
        "delay": 0.02,
    },
}


def toml(run: str, settings: Mapping[str, Mapping[str, Any]]) -> str:
    """``settings`` as a file that fedmq reads."""
    lines = [f"run = {json.dumps(run)}"]
    for table, values in settings.items():
        lines += [f"[{table}]", *(f"{key} = {json.dumps(value)}" for key, value in values.items())]
    return "\n".join(lines) + "\n"


class Site:
    """A context manager that ends what it started.

    Args:
        folder: where the run's settings, results and logs are.
        url: the broker's address.
        workers: how many shards there are.
        settings: what differs from :data:`SETTINGS`, by table.
        prefix: of the run's name.
    """

    def __init__(
        self,
        folder: Path,
        url: str,
        *,
        workers: int,
        settings: Mapping[str, Mapping[str, Any]] | None = None,
        prefix: str = "site",
    ) -> None:
        self.folder, self.url, self.workers = folder, url, workers
        self.topology: Topology = fresh_topology(prefix)
        self.results = folder / "runs" / self.topology.run
        self.store = CheckpointStore(self.results / "checkpoints", self.topology.run)
        self.processes: list[subprocess.Popen[bytes]] = []
        more = settings or {}
        self.settings = {table: {**values, **more.get(table, {})} for table, values in SETTINGS.items()}
        (folder / "fedmq.toml").write_text(toml(self.topology.run, self.settings))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()

    def initialise(self) -> None:
        """Make the run, as ``fedmq init`` does."""
        model, parameters = initial_parameters(load_task(str(self.settings["worker"]["task"])))
        self.store.create(model, parameters, now=time.time())

    def command(
        self, *arguments: str, url: str = "", log: str = "log", module: tuple[str, ...] = ("fedmq",)
    ) -> subprocess.Popen[bytes]:
        """Start ``python -m MODULE ARGUMENTS`` in the folder; what it says is added to the file ``log``."""
        with (self.folder / log).open("ab") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", *module, *arguments],
                cwd=self.folder,
                env=environment_of(url or self.url),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )
        self.processes = [other for other in self.processes if other.returncode is None]
        self.processes.append(process)
        return process

    def worker(self, index: int, **how: Any) -> subprocess.Popen[bytes]:
        """Start worker ``w<index>`` on shard ``index``."""
        return self.command("worker", "--name", f"w{index}", "--shard", f"{index}/{self.workers}", **how)

    def outbox(self, index: int) -> Path:
        """Where worker ``w<index>`` keeps which ids it has given out."""
        return self.results / "workers" / f"w{index}" / "outbox.json"

    def confirmed(self, index: int) -> int:
        """How many updates worker ``w<index>`` knows to be confirmed, as far as its folder says."""
        outbox = self.outbox(index)
        return int(json.loads(outbox.read_text())["confirmed"]) if outbox.exists() else 0

    def life(self, index: int) -> tuple[str, int]:
        """The incarnation that worker ``w<index>`` began last, and how many updates it knows to be confirmed."""
        content = json.loads(self.outbox(index).read_text()) if self.outbox(index).exists() else {}
        return str(content.get("incarnation", "")), int(content.get("confirmed", 0))

    @property
    def history(self) -> list[dict[str, Any]]:
        """The lines of the run's history."""
        return list(read_history(self.results / "history.jsonl"))

    def version(self) -> int:
        """How many versions the history has."""
        return sum(line["kind"] == "version" for line in self.history)

    def epochs(self) -> list[int]:
        """The epoch of each start of an aggregator."""
        return [line["epoch"] for line in self.history if line["kind"] == "start"]

    def log(self, name: str = "log") -> str:
        """What the processes have said."""
        file = self.folder / name
        return file.read_text(errors="replace") if file.exists() else ""
