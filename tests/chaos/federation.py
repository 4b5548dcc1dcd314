"""What the nemesis torments: aggregators, workers and a broker, each process behind proxies of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from broker.amqp.node import PrivateNode
from tests.chaos.judge import Knowledge
from tests.chaos.loads import LOADS
from tests.support.proxy import Proxy
from tests.support.site import Site

__all__ = ["Federation", "Member", "Tail"]

#: Addresses of the broker that each process knows; each is a proxy.
ADDRESSES = 2
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    # The shortest heartbeat there is: a silent peer is given up after about ten seconds.
    "broker": {"heartbeat": 5, "connect_timeout": 5, "blocked_timeout": 20},
    "aggregator": {"commit_count": 3, "commit_seconds": 2.0},
    "worker": {"delay": 0.1, "heartbeat_seconds": 1.0},
}

Kind = Literal["aggregator", "worker"]


@dataclass(eq=False)
class Member:
    """A process that is started again whenever it dies."""

    kind: Kind
    index: int
    proxies: list[Proxy]
    process: subprocess.Popen[bytes] | None = None
    is_frozen: bool = False
    condemned: str = ""
    """How we have ended it; empty while it may not end."""

    @property
    def name(self) -> str:
        """For people: ``aggregator-0``, ``worker-2``."""
        return f"{self.kind}-{self.index}"

    @property
    def is_alive(self) -> bool:
        """Whether it runs, as far as we have not ended it."""
        return self.process is not None and not self.condemned


class Tail:
    """Follows a history file without reading it twice."""

    def __init__(self, file: Path) -> None:
        self.versions: list[tuple[float, float, int]] = []
        """For each version when it was made, when it was seen here, and how many updates it has."""
        self.heard: dict[str, float] = {}
        """When an update of a worker was last seen in a version."""
        self._file = file
        self._position = 0

    def look(self) -> None:
        """Take in what is new."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            if os.fstat(file.fileno()).st_size < self._position:
                self._position = 0
            file.seek(self._position)
            content = file.read()
        content = content[: content.rfind(b"\n") + 1]
        self._position += len(content)
        now = time.time()
        for text in content.splitlines():
            line = json.loads(text)
            if line["kind"] == "version":
                self.versions.append((line["time"], now, len(line["updates"])))
                self.heard |= {update["worker"]: now for update in line["updates"]}


@dataclass
class Federation:
    """A context manager: the node runs, the run is made, nothing else is started."""

    folder: Path
    seed: int
    aggregators: int
    workers: int
    load: str = "whole"
    node: PrivateNode = field(default_factory=PrivateNode)

    def __post_init__(self) -> None:
        self.knowledge = Knowledge()
        self.members: list[Member] = []
        self.problems: list[str] = []
        self.at_node = threading.Lock()
        """Held by whoever stops, kills, starts or commands the node."""
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.node)
            self.site = stack.enter_context(
                Site(self.folder, self.node.url, workers=self.workers, settings=self._settings(), prefix="chaos")
            )
            self.site.initialise()
            self.tail = Tail(self.site.results / "history.jsonl")
            for kind, index in self._roles():
                proxies = [
                    stack.enter_context(Proxy.to(self.node.url, seed=hash((self.seed, len(self.members), number))))
                    for number in range(ADDRESSES)
                ]
                self.members.append(Member(kind, index, proxies))
            stack.callback(self._thaw)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def _settings(self) -> Mapping[str, Mapping[str, Any]]:
        return {table: {**values, **LOADS[self.load].get(table, {})} for table, values in SETTINGS.items()}

    def _roles(self) -> Iterator[tuple[Kind, int]]:
        yield from (("aggregator", index) for index in range(self.aggregators))
        yield from (("worker", index) for index in range(self.workers))

    def _thaw(self) -> None:
        for member in self.members:
            self.go_on(member)

    # ------------------------------------------------------------------------------------------ processes

    def start(self, member: Member) -> None:
        """Start it, if it does not run."""
        if member.process is not None:
            return
        url = ",".join(proxy.url(self.node.url) for proxy in member.proxies)
        how: dict[str, Any] = {"url": url, "log": f"{member.name}.log"}
        member.condemned, member.is_frozen = "", False
        if member.kind == "worker":
            member.process = self.site.worker(member.index, **how)
        else:
            member.process = self.site.command("aggregator", **how)

    def kill(self, member: Member, number: signal.Signals) -> bool:
        """Send it SIGKILL or SIGTERM; False if it is not there."""
        if member.process is None or not member.is_alive:
            return False
        member.condemned = number.name
        member.process.send_signal(number)
        if number is not signal.SIGKILL:
            self.go_on(member)
        return True

    def freeze(self, member: Member) -> bool:
        """Stop it where it is; False if it is not there."""
        if member.process is None or not member.is_alive or member.is_frozen:
            return False
        member.is_frozen = True
        member.process.send_signal(signal.SIGSTOP)
        return True

    def go_on(self, member: Member) -> None:
        """Wake it up again."""
        if member.process is not None and member.is_frozen and member.process.poll() is None:
            member.process.send_signal(signal.SIGCONT)
        member.is_frozen = False

    def end(self) -> None:
        """Kill everybody, so that what workers knew can be looked at."""
        for member in self.members:
            self.kill(member, signal.SIGKILL)
            if member.process is not None:
                member.process.wait()
        self.bury()

    def bury(self) -> list[Member]:
        """Those that have died since the last look; what a worker knew is collected."""
        dead = [member for member in self.members if member.process is not None and member.process.poll() is not None]
        for member in dead:
            assert member.process is not None
            code = member.process.returncode
            if not _is_expected(member.condemned, code):
                self.problems.append(f"{member.name} ended with exit code {code} ({member.condemned or 'by itself'})")
            member.process = None
            if member.kind == "worker":
                self.knowledge.collect(self.site.outbox(member.index))
        return dead

    # ------------------------------------------------------------------------------------------ looking

    def leader(self) -> Member | None:
        """The aggregator that leads, as far as its log says; only for taking aim, never for the verdict."""
        best: tuple[int, Member] | None = None
        for member in self.members:
            if member.kind != "aggregator" or not member.is_alive:
                continue
            lines = self.site.log(f"{member.name}.log").splitlines()
            epochs = [int(line.rsplit(" ", 1)[1]) for line in lines if " leads run " in line and ", epoch " in line]
            if epochs and (best is None or epochs[-1] > best[0]):
                best = epochs[-1], member
        return best[1] if best else None

    def left_over(self) -> dict[str, int]:
        """Messages, delivered or not, in the run's queues that must be empty in the end."""
        topology = self.site.topology
        names = {topology.updates, topology.control, topology.dead}
        with self.at_node:
            lines = self.node.ctl("list_queues", "--no-table-headers", "name", "messages").splitlines()
        found = {line.split("\t")[0]: int(line.split("\t")[1]) for line in lines if line.count("\t") == 1}
        return {name: found.get(name, -1) for name in names if found.get(name, -1) != 0}


def _is_expected(condemned: str, code: int) -> bool:
    match condemned:
        case "SIGKILL":
            return code == -signal.SIGKILL
        case "SIGTERM":
            # Before Python has set up its handler, SIGTERM ends a process at once.
            return code in (0, -signal.SIGTERM)
        case _:
            return False
