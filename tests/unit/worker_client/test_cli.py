from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
#: Nothing listens on port 1: a worker there waits for its broker.
ABSENT = ("--broker", "amqp://guest:guest@127.0.0.1:1/")
TASK = ("--task", "tests.unit.worker_client.models:Points")


@contextmanager
def command(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    """``python -m worker_client`` with ``arguments``, in ``folder``."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FEDMQ_")}
    with subprocess.Popen(
        [sys.executable, "-m", "worker_client", *arguments],
        cwd=folder,
        env=environment | {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "FEDMQ_LOG_FORMAT": "human"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def outcome(folder: Path, *arguments: str) -> tuple[int, str]:
    with command(folder, *arguments) as process:
        _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--set", "worker.batch_size=0"), 2, "worker.batch_size = '0'"),
        (("--set", "worker.bach_size=1"), 2, "did you mean 'batch_size'"),
        (("--set", "batch_size"), 2, "give it as table.key=value"),
        (("--shard", "4/4"), 2, "the index counts from 0"),
        (("--run", "two words"), 2, "a name has 1 to 64 letters"),
        (("--config", "missing.toml"), 2, "no such file"),
        (("--task", "nowhere:Task"), 3, "there is no module 'nowhere'"),
        ((*TASK, "--set", "worker.device=mps"), 3, "use 'auto' or 'cpu'"),
    ],
)
def test_a_mistake_is_one_line_and_an_exit_code(
    tmp_path: Path, arguments: tuple[str, ...], code: int, message: str
) -> None:
    returned, errors = outcome(tmp_path, "run", *ABSENT, *arguments)

    assert returned == code
    assert message in errors
    assert errors.startswith("error: ")
    assert "Traceback" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("verb", ["run", "evaluate"])
def test_a_signal_stops_a_worker_that_waits_for_its_broker(tmp_path: Path, verb: str, number: signal.Signals) -> None:
    with command(tmp_path, verb, *ABSENT, *TASK, "--name", "w7") as process:
        # Given a worker that has found nobody at the broker's address
        assert process.stderr is not None
        while "127.0.0.1:1:" not in process.stderr.readline():
            assert process.poll() is None

        # When
        process.send_signal(number)

        # Then
        assert process.wait(timeout=30) == 0
        rest = process.stderr.read()
        assert "Traceback" not in rest
        assert "0 updates confirmed, no version yet" in rest


def test_the_task_that_is_taken_if_none_is_given_is_told_at_once(tmp_path: Path) -> None:
    returned, errors = outcome(tmp_path, "run", *ABSENT, "--set", "worker.device=mps")

    assert returned == 3
    assert "taking the example worker_client.tasks.digits:Digits" in errors.splitlines()[0]


def test_a_worker_keeps_its_identity_under_the_runs_folder(tmp_path: Path) -> None:
    with command(tmp_path, "run", *ABSENT, *TASK, "--name", "w7", "--run", "mine") as process:
        assert process.stderr is not None
        while "127.0.0.1:1:" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0

    assert (tmp_path / "runs/mine/workers/w7/outbox.json").exists()
