"""fedmq's commands as processes of their own, as a user starts them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from broker.addresses import is_loopback
from tests.support.waiting import wait_for

__all__ = [
    "ABSENT",
    "LINE",
    "PATIENCE",
    "ROOT",
    "SECRET",
    "WRONG_TASKS",
    "Done",
    "Running",
    "assert_one_message",
    "environment_of",
    "fedmq",
    "running",
]

ROOT = Path(__file__).resolve().parents[2]
#: Nothing listens on port 1. The password must not come out anywhere.
SECRET = "pl4nted-s3cret"  # noqa: S105 (of nothing)
ABSENT = f"amqp://someone:{SECRET}@127.0.0.1:1/"
LINE = ("--task", "tests.support.tasks:Line")
#: Long enough to import torch on a busy machine.
PATIENCE = 60.0


#: A user's module with one task for each thing that can go wrong in it.
WRONG_TASKS = """
from torch import nn
from tests.support.tasks import Line

class NoModel(Line):
    def model(self):
        raise ValueError("no layers")

class NoData(Line):
    def data(self, shard):
        raise FileNotFoundError("patients.csv")

class Empty(Line):
    def data(self, shard):
        return []

class BadTraining(Line):
    def train(self, model, dataset, context):
        raise RuntimeError("the loss is a banana")

class Wider(Line):
    def model(self):
        return nn.Linear(5, 1)
"""


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str


def environment_of(url: str | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment of a command; the broker's address goes by it, never by the command line."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDMQ_", "COLUMNS"))}
    kept |= {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "PYTHONUNBUFFERED": "1"}
    # What a person is told, of whom most tests are; a pipe would have JSON.
    kept["FEDMQ_LOG_FORMAT"] = "human"
    if url is not None:
        if not is_loopback(urlsplit(url).hostname or "localhost"):  # the broker of TEST_RABBITMQ_URL
            kept["FEDMQ_BROKER_ALLOW_PLAIN"] = "true"
        kept["FEDMQ_BROKER_URL"] = url
    return kept | dict(more or {})


def fedmq(
    folder: Path,
    *arguments: str,
    url: str | None = ABSENT,
    module: str = "fedmq",
    timeout: float = PATIENCE,
    environment: Mapping[str, str] | None = None,
) -> Done:
    """Run ``python -m MODULE ARGUMENTS`` in ``folder`` to its end."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=folder,
        env=environment_of(url, environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr)


@dataclass
class Running:
    """A command that goes on; what it prints goes to a file."""

    process: subprocess.Popen[bytes]
    file: Path

    @property
    def log(self) -> str:
        """What it has printed so far."""
        return self.file.read_text(errors="replace")

    def wait_log(self, text: str, timeout: float = PATIENCE) -> None:
        """Wait until it has printed ``text``."""
        wait_for(lambda: text in self.log or self.process.poll() is not None, timeout, what=f"{text!r} in {self.log!r}")
        assert text in self.log, f"ended with {self.process.returncode} and without {text!r}:\n{self.log}"

    def wait(self, timeout: float = PATIENCE) -> int:
        """Wait for its end; the exit code."""
        return self.process.wait(timeout)

    def terminate(self, timeout: float = PATIENCE, number: signal.Signals = signal.SIGTERM) -> int:
        """Ask it to stop; the exit code."""
        self.process.send_signal(number)
        return self.wait(timeout)


@contextmanager
def running(
    folder: Path,
    *arguments: str,
    url: str | None = ABSENT,
    name: str = "",
    environment: Mapping[str, str] | None = None,
) -> Iterator[Running]:
    """Start ``fedmq ARGUMENTS`` in ``folder``; it is killed at the end of the block if it is still there."""
    file = folder / f"{name or arguments[0]}.log"
    with (
        file.open("wb") as log,
        subprocess.Popen(
            [sys.executable, "-m", "fedmq", *arguments],
            cwd=folder,
            env=environment_of(url, environment),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        ) as process,
    ):
        try:
            yield Running(process, file)
        finally:
            process.kill()


def assert_one_message(done: Done, code: int, *words: str) -> None:
    """One error on stderr, with these words, and neither a traceback nor a password."""
    assert done.code == code, done
    assert done.err.count("error: ") == 1, done.err
    assert "Traceback" not in done.err
    assert SECRET not in done.err + done.out
    for word in words:
        assert word in done.err, done.err
