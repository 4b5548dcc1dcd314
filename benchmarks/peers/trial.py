"""One system at one size: start it, wait for its rounds, measure, kill it."""

from __future__ import annotations

import itertools
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.peers.processes import Group, Memory, marked

__all__ = ["Failure", "Outcome", "Plan", "System", "Trial", "free_port", "measure", "seconds_of_rounds"]

MB = 1_000_000
#: How often the file with the starts of rounds is looked at. They are timed by who writes them, so this adds nothing.
LOOK = 0.1


class Failure(Exception):
    """A system could not be measured; the message says why, for the table."""


@dataclass(frozen=True)
class Plan:
    """What is measured, the same for all systems.

    ``start_limit`` is the time in seconds from the first process to the first round, ``round_limit`` that of a round.
    """

    rounds: int = 5
    warm_up: int = 1
    workers: int = 4
    start_limit: float = 180.0
    round_limit: float = 180.0

    @property
    def starts(self) -> int:
        """Starts of rounds that must be seen; the last one ends the last round that counts."""
        return self.warm_up + self.rounds + 1


@dataclass(frozen=True)
class Outcome:
    """Seconds of each round and peak memory of the server's side in bytes, or why there are none.

    Of fedmq, ``seconds`` holds the least, the median and the most.
    """

    system: str
    mb: float
    seconds: tuple[float, ...] = ()
    largest: int = 0
    """Of the largest of the server's processes."""
    together: int = 0
    """Of all of the server's processes at one moment."""
    failure: str = ""

    @property
    def median(self) -> float:
        """Of the seconds of a round."""
        return statistics.median(self.seconds)


@dataclass
class Trial:
    """What a system needs to start: who runs, how large the model is, and where to write."""

    plan: Plan
    mb: float
    programs: Path
    group: Group
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """For everything that is written."""
        return self.group.folder

    @property
    def stamps(self) -> Path:
        """The server's side appends a line with its monotonic clock, in seconds, as each round starts."""
        return self.folder / "starts"

    @property
    def values(self) -> int:
        """Number of float32 values in the model."""
        return int(self.mb * MB) // 4

    @property
    def environment(self) -> dict[str, str]:
        """Nothing is written to, or read from, the home of whoever runs this."""
        return {
            **{key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))},
            "HOME": str(self.folder),
            "PATH": f"{self.programs}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONUNBUFFERED": "1",
            # Proxies are for the way out; everything here is on loopback.
            "NO_PROXY": "*",
            "no_proxy": "*",
            **self.settings,
        }

    def wait(self, condition: Callable[[], bool], limit: float, what: str) -> None:
        """Wait until something is so.

        Raises:
            Failure: it did not come true in time, or a process ended that should not.
        """
        deadline = time.monotonic() + limit
        while not condition():
            if gone := {name: code for name, code in self.group.ended().items() if code != 0}:
                name, code = next(iter(gone.items()))
                raise Failure(f"{name} ended with exit code {code} before {what}")
            if time.monotonic() > deadline:
                raise Failure(f"{what} did not come within {limit:g} s")
            time.sleep(LOOK)

    def finish(self, name: str, limit: float) -> None:
        """Wait until a process that was started under this name has ended well.

        Raises:
            Failure: it ended badly, or not in time.
        """
        self.wait(lambda: name in self.group.ended(), limit, f"the end of {name}")


@dataclass(frozen=True)
class System:
    """A system to measure.

    Args:
        name: on the command line.
        title: in the table; ``{version}`` is that of ``package``.
        how: what was set other than by default, for the lines under the table.
        package: the distribution that is measured.
        requirements: name of the file with what its environment holds.
        start: starts server and clients, which then run for :attr:`Plan.starts` rounds, or until killed.
        settings: environment variables of all its processes.
    """

    name: str
    title: str
    how: str
    package: str
    requirements: str
    start: Callable[[Trial], None]
    settings: dict[str, str] = field(default_factory=dict)


def seconds_of_rounds(starts: list[float], plan: Plan) -> tuple[float, ...]:
    """From the starts of all rounds to the seconds of those that count."""
    return tuple(after - before for before, after in itertools.pairwise(starts[plan.warm_up : plan.starts]))


def measure(system: System, programs: Path, mb: float, plan: Plan, *, keep: Path | None = None) -> Outcome:
    """Run a trial. Whatever goes wrong becomes the outcome's ``failure``; nothing is left running.

    Args:
        system: to measure.
        programs: of its environment.
        mb: size of the model in megabytes.
        plan: how long.
        keep: leave the trial's folder there instead of deleting it.
    """
    folder = Path(tempfile.mkdtemp(prefix="fedmq-peers-", dir=keep))
    with Group(folder, keep=keep is not None) as group:
        trial = Trial(plan=plan, mb=mb, programs=programs, group=group, settings=system.settings)
        memory = Memory(partial(marked, group.mark("server")))
        memory.start()
        try:
            system.start(trial)
            starts = _wait_for_rounds(trial)
        except (Failure, OSError) as failure:
            log = group.tail()
            print(f"# {system.name}, {mb:g} MB: {failure}\n{log}", file=sys.stderr, flush=True)
            return Outcome(system.name, mb, failure=str(failure))
        finally:
            memory.end()
        return Outcome(
            system.name, mb, seconds_of_rounds(starts, plan), largest=memory.largest, together=memory.together
        )


def free_port() -> int:
    """A port of the loopback interface that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _starts(file: Path) -> list[float]:
    text = file.read_text() if file.exists() else ""
    # A last line without an end is still being written.
    return [float(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _wait_for_rounds(trial: Trial) -> list[float]:
    for number in range(1, trial.plan.starts + 1):
        limit = trial.plan.start_limit if number == 1 else trial.plan.round_limit
        trial.wait(partial(_has, trial.stamps, number), limit, f"the start of round {number}")
    return _starts(trial.stamps)


def _has(file: Path, number: int) -> bool:
    return len(_starts(file)) >= number
