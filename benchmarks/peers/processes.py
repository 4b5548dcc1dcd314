"""Processes of one trial, with everything that they start, and an end to all of it.

Other people's launchers daemonise, change their session and forget their children, so neither process groups nor
parents tell who belongs to a trial. What every descendant inherits is the environment: each process gets a variable
with the trial's token and its side, and is found by it in /proc. This module uses the standard library alone and
works on Linux.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

__all__ = ["Group", "Memory", "descendants", "marked", "sweep"]

MARK = "FEDMQ_BENCHMARK"

Side = Literal["server", "client"]


def marked(mark: str) -> list[int]:
    """Ids of the living processes of a trial, or of one side of it.

    A process that forbids others to look into it (Flower's do) counts with its parent.

    Args:
        mark: the value of the variable, or what it starts with: ``<token>`` or ``<token>-<side>``.
    """
    needle = f"{MARK}={mark}".encode()
    parents: dict[int, int] = {}
    found, closed = set(), set()
    for entry in Path("/proc").iterdir():
        if not entry.name.isdecimal():
            continue
        pid = int(entry.name)
        fields = _fields(pid)
        if fields.get("State", "Z")[0] in "ZX":
            continue
        parents[pid] = int(fields["PPid"])
        try:
            variables = (entry / "environ").read_bytes().split(b"\0")
        except PermissionError:
            closed.add(pid)
        except OSError:
            continue
        else:
            if any(variable.startswith(needle) for variable in variables):
                found.add(pid)
    while children := {pid for pid in closed - found if parents[pid] in found}:
        found |= children
    return sorted(found)


def descendants(ancestor: int, name: str) -> list[int]:
    """Ids of the processes of this name that a process has started, or that those have started."""
    family = {ancestor}
    known = {int(entry.name): _fields(int(entry.name)) for entry in Path("/proc").iterdir() if entry.name.isdecimal()}
    while more := {pid for pid, fields in known.items() if int(fields.get("PPid", "0")) in family} - family:
        family |= more
    return sorted(pid for pid in family if known.get(pid, {}).get("Name") == name)


def sweep(token: str, patience: float = 20.0) -> list[int]:
    """Kill everything that is marked with a token, until nothing is left; the ids of what is left all the same."""
    deadline = time.monotonic() + patience
    while left := marked(token):
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            return left
        # A process that was about to fork while it was killed has a child that the next look finds.
        time.sleep(0.05)
    return []


class Memory(threading.Thread):
    """Watches the resident memory of some processes, told by a function that is asked every tenth look.

    ``largest`` is the peak of the largest single process, from the kernel's own high-water mark. ``together`` is
    the highest sum over all of them that was seen at one moment, pages that they share counted as often as shared.
    Both in bytes.
    """

    def __init__(self, who: Callable[[], Sequence[int]], period: float = 0.1) -> None:
        super().__init__(daemon=True, name="memory")
        self.largest = 0
        self.together = 0
        self._who = who
        self._period = period
        self._over = threading.Event()

    def run(self) -> None:
        """Look until told to end."""
        pids: Sequence[int] = ()
        turn = 0
        while not self._over.wait(self._period):
            if turn % 10 == 0:
                pids = self._who()
            turn += 1
            self.look(pids)

    def look(self, pids: Sequence[int]) -> None:
        """One sample."""
        now = [_memory(pid) for pid in pids]
        self.largest = max([self.largest, *(peak for _, peak in now)])
        # A peak between two looks is known of each process, but not of all together.
        self.together = max(self.together, self.largest, sum(resident for resident, _ in now))

    def end(self) -> None:
        """Look once more, and then no more."""
        self._over.set()
        self.join()
        self.look(self._who())


class Group:
    """A context manager for the processes of a trial; on exit all are dead and the folder is gone.

    That includes the case that this process is killed with SIGKILL: a *lifeline*, a process that reads a pipe which
    only this one holds open, does the same then.
    """

    def __init__(self, folder: Path, *, keep: bool = False) -> None:
        self.folder = folder
        self.token = secrets.token_hex(8)
        self._keep = keep
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._lifeline: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-I", __file__, self.token, "" if self._keep else str(self.folder)]
        self._lifeline = subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        left = sweep(self.token)
        for process in self._processes.values():
            if process.pid not in left:
                process.wait()
        if self._lifeline is not None and self._lifeline.stdin is not None:
            self._lifeline.stdin.close()
            self._lifeline.wait()
        if not self._keep:
            shutil.rmtree(self.folder, ignore_errors=True)

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        side: Side,
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Start a process; what it prints goes to ``<name>.log`` in the trial's folder."""
        with (self.folder / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [str(part) for part in command],
                cwd=folder or self.folder,
                env={**(environment or os.environ), MARK: self.mark(side)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self._processes[name] = process
        return process

    def mark(self, side: Side) -> str:
        """What the processes of a side are marked with."""
        return f"{self.token}-{side}"

    def ended(self) -> dict[str, int]:
        """Processes that were started here and have ended, with their exit codes."""
        return {name: process.returncode for name, process in self._processes.items() if process.poll() is not None}

    def tail(self, lines: int = 6) -> str:
        """The last lines of each log, for a person who wants to know why."""
        parts = []
        for log in sorted(self.folder.glob("*.log")):
            last = log.read_text(errors="replace").splitlines()[-lines:]
            parts += [f"--- {log.name}", *last]
        return "\n".join(parts)


def _memory(pid: int) -> tuple[int, int]:
    fields = _fields(pid)
    resident, peak = (int(fields.get(key, "0 kB").split()[0]) * 1024 for key in ("VmRSS", "VmHWM"))
    return resident, peak


def _fields(pid: int) -> dict[str, str]:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return {}
    return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}


def _outlive(token: str, folder: str) -> None:
    # Ctrl-C reaches the owner too, and it is the owner who ends things as long as it lives.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    sweep(token)
    if folder:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    _outlive(sys.argv[1], sys.argv[2])
