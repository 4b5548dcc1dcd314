"""One run of chaos: start, torment, heal, drain, judge."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from tests.chaos.federation import Federation, Kind
from tests.chaos.judge import judge
from tests.chaos.nemesis import Nemesis, schedule
from tests.chaos.report import Report, show

__all__ = ["campaign"]

#: How often everything is looked at.
LOOK = 0.05
#: How long a healed run may take for what it must do. A hang is a finding, so this is generous.
PATIENCE = 180.0


class _Hang(Exception):
    """Something did not come about."""


def campaign(
    folder: Path,
    *,
    seed: int,
    duration: float,
    kills: int = 0,
    gap: float = 3.0,
    aggregators: int = 2,
    workers: int = 4,
    load: str = "whole",
    console: Console | None = None,
) -> Report:
    """Torment a federation in ``folder`` for ``duration`` seconds, and until ``kills`` SIGKILLs were sent.

    Faults come ``gap`` seconds apart on the average. ``load`` is one of :data:`LOADS`. What happened stands in
    ``folder`` afterwards: the run's files, a log for each process, the node's log, ``chaos.log`` and ``report.json``.
    """
    begun = time.monotonic()
    console = console or Console(quiet=True)

    def say(text: str) -> None:
        line = f"{time.monotonic() - begun:7.1f} s  {text}"
        console.print(line, highlight=False)
        with (folder / "chaos.log").open("a") as log:
            log.write(f"{time.time():.3f} {line}\n")

    say(f"seed {seed}, {duration:.0f} s, {aggregators} aggregators, {workers} workers, load {load}; all is in {folder}")
    with Federation(folder, seed, aggregators, workers, load) as federation:
        work = _Work(federation, Nemesis(federation, schedule(seed, gap), say), say)
        try:
            work.set_up()
            work.torment(duration, kills)
            work.heal()
            work.drain()
        except _Hang as hang:
            federation.problems.append(f"hangs: {hang}")
            say(f"hangs: {hang}")
            federation.end()
        finally:
            (folder / "node.log").write_text(federation.node.log)
        federation.tail.look()
        verdict = judge(federation.site.store, federation.site.results / "history.jsonl", federation.knowledge)
    report = Report(
        seed=seed,
        load=load,
        seconds=time.monotonic() - begun,
        done=work.nemesis.done,
        missed=work.nemesis.missed,
        made=[made for made, _, _ in federation.tail.versions],
        verdict=verdict,
        problems=federation.problems,
    )
    (folder / "report.json").write_text(json.dumps(report.plain(), indent=1))
    show(report, console)
    return report


class _Work:
    """The steps of a campaign."""

    def __init__(self, federation: Federation, nemesis: Nemesis, say: Callable[[str], None]) -> None:
        self.federation, self.nemesis, self.say = federation, nemesis, say

    def _until(self, condition: Callable[[], bool], what: str, turn: Callable[[], object], patience: float) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            if time.monotonic() > deadline:
                raise _Hang(f"{what} did not come about within {patience:.0f} s")
            turn()
            self.federation.tail.look()
            time.sleep(LOOK)

    def set_up(self) -> None:
        """Everybody is there and has a part in a version."""
        for member in self.federation.members:
            self.federation.start(member)
        self._until(self._all_heard_since(0.0), "a first update of every worker", self.federation.bury, PATIENCE)
        self.say("everybody is at work")

    def torment(self, duration: float, kills: int) -> None:
        """Faults, for so long and until so many were killed; no more than twice as long."""
        begin = time.monotonic()

        def is_enough() -> bool:
            passed = time.monotonic() - begin
            return passed >= duration and (self.nemesis.kills >= kills or passed >= 2 * duration)

        self._until(is_enough, "the end", self.nemesis.turn, 3 * duration + PATIENCE)

    def heal(self) -> None:
        """Everybody is back, and every worker has a part in a new version."""
        self.say("healing")
        quietly: Callable[[], None] = lambda: self.nemesis.turn(more=False)  # noqa: E731 (a name for it reads better)
        self._until(lambda: self.nemesis.is_quiet, "the end of the last faults", quietly, PATIENCE)
        for member in self.federation.members:
            self.federation.go_on(member)
            for proxy in member.proxies:
                proxy.heal()
        self._until(self._all_heard_since(time.time()), "a new update of every worker", quietly, PATIENCE)

    def drain(self) -> None:
        """Workers leave in good order, what they published is taken in, the aggregators leave."""
        self.say("draining")
        self._dismiss("worker")
        self._until(lambda: not self.federation.left_over(), "empty queues", lambda: None, PATIENCE)
        self._dismiss("aggregator")
        for queue, count in self.federation.left_over().items():
            self.federation.problems.append(f"{count} messages in {queue} after the end")

    def _dismiss(self, kind: Kind) -> None:
        members = [member for member in self.federation.members if member.kind == kind]
        for member in members:
            self.federation.kill(member, signal.SIGTERM)
        gone: Callable[[], bool] = lambda: all(member.process is None for member in members)  # noqa: E731
        self._until(gone, f"the end of each {kind} after SIGTERM", self.federation.bury, PATIENCE)

    def _all_heard_since(self, moment: float) -> Callable[[], bool]:
        def are_heard() -> bool:
            heard = self.federation.tail.heard
            return all(heard.get(f"w{index}", -1.0) > moment for index in range(self.federation.workers))

        return are_heard
