"""A whole federation on this machine: processes on a private RabbitMQ, or threads on the in-process broker."""

from __future__ import annotations

import contextlib
import ctypes
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from aggregator.checkpoint import CheckpointStore
from aggregator.cli import checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.service import AggregatorService
from aggregator.tracking import tracker_names, trackers_of
from aggregator.tracking.follow import tracking
from broker import logs
from broker.errors import FedmqError
from broker.memory import MemoryBroker
from broker.settings import Settings, plain
from worker_client.client import run_evaluator, run_worker
from worker_client.config import WorkerConfig
from worker_client.loading import load_task

__all__ = ["Member", "Processes", "Threads"]

PR_SET_PDEATHSIG = 1
GRACE_SECONDS = 15.0


@dataclass(frozen=True, slots=True)
class Member:
    """One program of the federation."""

    name: str
    command: str
    """``aggregator``, ``worker`` or ``evaluate``."""
    settings: Mapping[str, str | int | float]
    """Settings of its own, by ``table.key``."""
    after_round: int = 0
    """Joins when this round has closed."""
    killed_at: int = 0
    """Is killed when this round has closed; 0 for never."""


class Processes:
    """Members as child processes. Whatever happens to this process, none of them is left behind."""

    def __init__(self, *, config: Path, url: str, logs: Path) -> None:
        """Args: ``config`` is the file that all of them read; ``url`` goes to them by the environment."""
        self._config = config
        self._logs = logs
        # Not on the command line, where every user of the machine could read the password.
        self._environment = {**os.environ, "FEDMQ_BROKER_URL": url, "PYTHONUNBUFFERED": "1"}
        # Whoever looks into their logs is a person, who has just seen the demonstration.
        self._environment.setdefault("FEDMQ_LOG_FORMAT", "human")
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._killed: set[str] = set()

    def start(self, member: Member) -> None:
        """Start ``member``; its log goes to ``<logs>/<name>.log``."""
        command = [sys.executable, "-m", "fedmq", member.command, "--config", str(self._config)]
        for key, value in member.settings.items():
            command += ["--set", f"{key}={value}"]
        self._logs.mkdir(parents=True, exist_ok=True)
        with (self._logs / f"{member.name}.log").open("ab") as log:
            self._children[member.name] = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                # Out of the terminal's foreground group, so that Ctrl-C reaches only this process, which then
                # asks each child once.
                start_new_session=True,
                preexec_fn=_die_with_parent,  # noqa: PLW1509 (only a system call; no locks are taken)
            )

    def check(self, names: Sequence[str] = ()) -> None:
        """Raise :class:`FedmqError` with the end of its log if a member (by default any) has failed."""
        for name, child in self._children.items():
            if (not names or name in names) and child.poll() not in (None, 0) and name not in self._killed:
                raise FedmqError(f"{name} ended with exit code {child.returncode}:\n{self._tail(name)}")

    def is_running(self, name: str) -> bool:
        """Whether ``name`` was started and has not ended."""
        child = self._children.get(name)
        return child is not None and child.poll() is None

    def wait(self, seconds: float) -> None:
        """Wait until all have ended by themselves, ``seconds`` at most."""
        deadline = time.monotonic() + seconds
        for child in self._children.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Ask those that still run to stop, and kill those that do not."""
        for child in self._children.values():
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)
        self.wait(GRACE_SECONDS)
        for child in self._children.values():
            if child.poll() is None:
                child.kill()
            child.wait()

    def kill(self, name: str) -> None:
        """End ``name`` as a machine that fails would: SIGKILL. Nobody minds that it does not end well."""
        self._killed.add(name)
        self._children[name].kill()

    def pid(self, name: str) -> int:
        """The process of ``name``."""
        return self._children[name].pid

    def _tail(self, name: str) -> str:
        lines = (self._logs / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(lines[-12:])


class Threads:
    """Members as threads over the in-process broker, where no RabbitMQ can be had."""

    def __init__(self, settings: Settings, resolve: Callable[[Member], Settings]) -> None:
        """Args: ``resolve`` gives a member's own settings."""
        self.broker = MemoryBroker()
        self._settings = settings
        self._resolve = resolve
        self._stop = threading.Event()
        self._threads: dict[str, threading.Thread] = {}
        self._service: AggregatorService | None = None
        self._failures: queue.SimpleQueue[FedmqError] = queue.SimpleQueue()

    def start(self, member: Member) -> None:
        """Start ``member``."""
        run = self._aggregator if member.command == "aggregator" else self._worker
        thread = threading.Thread(target=self._guarded, args=(run, member), name=member.name, daemon=True)
        self._threads[member.name] = thread
        thread.start()

    def check(self, names: Sequence[str] = ()) -> None:
        """Raise what ended a member."""
        del names
        with contextlib.suppress(queue.Empty):
            raise self._failures.get_nowait()

    def is_running(self, name: str) -> bool:
        """Whether ``name`` was started and has not ended."""
        return name in self._threads and self._threads[name].is_alive()

    def kill(self, name: str) -> None:
        """No thread can be killed. Raises :class:`NotImplementedError`."""
        raise NotImplementedError(f"{name} is a thread")

    def wait(self, seconds: float) -> None:
        """Wait until all have ended by themselves, ``seconds`` at most."""
        deadline = time.monotonic() + seconds
        for thread in self._threads.values():
            thread.join(max(0.0, deadline - time.monotonic()))

    def stop(self) -> None:
        """Ask all to stop."""
        self._stop.set()
        if self._service is not None:
            self._service.stop()
        self.wait(GRACE_SECONDS)

    def _guarded(self, run: Callable[[Member], None], member: Member) -> None:
        try:
            role = {"evaluate": "evaluator"}.get(member.command, member.command)
            name = {} if role == "aggregator" else {"worker": member.name}
            with logs.member(role=role, run=self._settings.run, **name):
                run(member)
        except FedmqError as error:
            self._failures.put(error)

    def _aggregator(self, _member: Member) -> None:
        config = self._settings.table("aggregator", AggregatorConfig)
        store = CheckpointStore(checkpoint_folder(self._settings), self._settings.run)
        prefetch = config.prefetch(store.head().model.nbytes)
        self._service = AggregatorService(
            folder=run_folder(self._settings),
            run=self._settings.run,
            config=config,
            store=store,
            chunk_bytes=self._settings.broker.chunk_bytes,
            pack_chunks=self._settings.broker.pack_chunks,
        )
        service = self._service
        with tracking(
            trackers_of(tracker_names(config.tracking)),
            run=self._settings.run,
            folder=run_folder(self._settings),
            settings=plain(self._settings),
            leads=lambda: service.leads and service.has_claimed,
        ):
            service.run(self.broker.aggregator(self._settings.run, prefetch=prefetch))

    def _worker(self, member: Member) -> None:
        config = self._resolve(member).table("worker", WorkerConfig)
        transport = self.broker.worker(self._settings.run, config.name)
        run = run_evaluator if member.command == "evaluate" else run_worker
        broker = self._settings.broker
        run(
            config,
            self._settings.run,
            transport,
            load_task(config.task),
            chunk_bytes=broker.chunk_bytes,
            pack_chunks=broker.pack_chunks,
            stop=self._stop,
        )


def _die_with_parent() -> None:
    """In the child: ask the kernel for SIGTERM when the parent dies, even by SIGKILL. Linux only."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def stopping(federation: Processes | Threads) -> Iterator[None]:
    """Stop the federation when the block is left, however that happens."""
    try:
        yield
    finally:
        federation.stop()
