"""``fedmq demo`` as a user runs it: to its end, interrupted, killed, without RabbitMQ."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import termios
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from safetensors.torch import load_file

from aggregator.checkpoint import CheckpointStore
from aggregator.history import read_history
from broker.amqp.node import PrivateNode
from fedmq.dashboard.serving import listen
from tests.support.commands import environment_of, fedmq, running
from tests.support.node import require_rabbitmq
from tests.support.waiting import wait_for
from worker_client.tasks.digits import Digits

SMALL = ("--rounds", "6", "--set", "demo.slow_seconds=0.2", "--set", "demo.late_round=2")


def processes_with(mark: str) -> list[str]:
    """Command lines of all processes in whose environment ``mark`` stands."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if mark.encode() in (entry / "environ").read_bytes():
                    found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
    return found


def results(folder: Path) -> dict[str, object]:
    """The summary, after a look at every file that the demo promises."""
    (run,) = (folder / "runs").iterdir()
    summary: dict[str, object] = json.loads((run / "summary.json").read_text())
    Digits().model().load_state_dict(load_file(run / "model.safetensors"), strict=True)
    versions = [line["version"] for line in read_history(run / "history.jsonl") if line["kind"] == "version"]
    assert versions == list(range(1, int(str(summary["rounds"])) + 1))
    assert tomllib.loads((run / "fedmq.toml").read_text())["run"] == run.name
    updates = summary["updates"]
    assert isinstance(updates, dict)
    assert updates["applied"] == CheckpointStore(run / "checkpoints", run.name).load().version * 4
    assert updates["rejected"] == sum(updates["rejected_by_reason"].values())
    return summary


@pytest.mark.broker
@pytest.mark.slow
def test_the_demo_reaches_095_on_digits_it_has_not_seen(tmp_path: Path, place: Path) -> None:
    require_rabbitmq()
    done = fedmq(tmp_path, "demo", url=None, timeout=170, environment={"TMPDIR": str(place)})

    assert done.code == 0, done
    assert "admin UI while this runs: http://127.0.0.1:" in done.out
    summary = results(tmp_path)
    evaluation, updates = summary["evaluation"], summary["updates"]
    assert isinstance(evaluation, dict)
    assert isinstance(updates, dict)
    assert evaluation["accuracy"] >= 0.95
    assert summary["evaluated_version"] == summary["rounds"] == 60
    assert updates["confirmed"] == updates["applied"] + updates["rejected"]
    (run,) = (tmp_path / "runs").iterdir()
    joined = {u["worker"] for line in read_history(run / "history.jsonl") for u in line.get("updates", [])}
    assert joined == {"w0", "w1", "w2", "w3"}
    assert processes_with(place.name) == []


def test_without_rabbitmq_the_demo_says_so_and_runs(tmp_path: Path) -> None:
    with closing(listen("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        own = ("--set", "demo.in_process=true", "--set", f"dashboard.port={port}")
        done = fedmq(tmp_path, "demo", *SMALL, *own, url=None, timeout=120)

    assert done.code == 0, done
    assert "in-process broker" in done.out
    assert re.search(rf"live page while this runs: http://127\.0\.0\.1:\d+/ \(port {port} is taken\)", done.out)
    assert results(tmp_path)["rounds"] == 6


@pytest.fixture
def place() -> Iterator[Path]:
    """A temporary folder for all processes of a demo, the node's user included; its name marks them."""
    folder = Path(tempfile.mkdtemp(prefix="fedmq-demo-test-", dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def has_made_a_version(folder: Path) -> bool:
    return any(line["kind"] == "version" for file in folder.glob("runs/*/history.jsonl") for line in read_history(file))


@pytest.mark.broker
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_the_demo_no_process_is_left(tmp_path: Path, number: signal.Signals, place: Path) -> None:
    """With a node of its own, whose Erlang processes must go too."""
    require_rabbitmq()
    with running(tmp_path, "demo", url=None, environment={"TMPDIR": str(place)}) as demo:
        wait_for(lambda: has_made_a_version(tmp_path), 90, what=demo.log)
        assert any("beam" in command for command in processes_with(place.name))
        assert sum("fedmq" in command for command in processes_with(place.name)) > 4

        code = demo.terminate(timeout=60, number=number)

        assert code == (-9 if number is signal.SIGKILL else 0), demo.log
        wait_for(lambda: processes_with(place.name) == [], 30, what=f"the end of {processes_with(place.name)}")
    (run,) = (tmp_path / "runs").iterdir()
    assert CheckpointStore(run / "checkpoints", run.name).load().version >= 1


def on_a_terminal(folder: Path, *arguments: str, url: str, columns: int, rows: int) -> tuple[int, str]:
    """Run fedmq on a terminal of this size; exit code, and what was written without what moves the cursor."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    with subprocess.Popen(
        [sys.executable, "-m", "fedmq", *arguments],
        cwd=folder,
        env=environment_of(url) | {"TERM": "xterm"},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
    ) as process:
        os.close(theirs)
        written = bytearray()
        deadline = time.monotonic() + 120
        with contextlib.suppress(OSError):  # how the end of the other side shows itself here
            while time.monotonic() < deadline:
                if select.select([ours], [], [], 1.0)[0]:
                    written += os.read(ours, 65536)
        os.close(ours)
        process.kill()
    return process.returncode, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "", written.decode(errors="replace"))


@pytest.mark.broker
def test_the_demo_on_a_broker_of_ones_own_and_on_a_terminal(tmp_path: Path, node: PrivateNode) -> None:
    code, text = on_a_terminal(tmp_path, "demo", *SMALL, "--no-dashboard", url=node.url, columns=100, rows=40)

    assert "Traceback" not in text
    frames = ["╭" + rest.partition("╯")[0] for rest in text.split("╭")[1:]]
    assert len(frames) > 10, text[-2000:]
    assert {len(line) for frame in frames for line in frame.splitlines()[:-1]} == {100}
    assert any(re.search(r"│  w3 +after round 2 ", frame) for frame in frames)
    middle = [frame for frame in frames if re.search(r"buffer +[1-4] of 4 ", frame)]
    assert middle, frames[-1]
    last = frames[-1]
    assert re.search(r"round +6 of 6 ", last), last
    assert re.search(r"staleness +median [\d.]+, p95 [\d.]+, largest \d+", last), last
    assert re.search(r"held-out +accuracy 0\.\d+, loss \d+\.\d+ \(version 6\)", last), last
    for worker in ("w0", "w1", "w2", "evaluator"):
        assert re.search(rf"│  {worker} +[a-z-]+ +\d+ +(\d+|-) +\d+\.\d+ +\d+\.\d+ ", last), last
    assert "final test accuracy" in text.rpartition("╯")[2]
    assert code == 0

    assert "private" not in text
    assert "live page" not in text
    assert results(tmp_path)["rounds"] == 6
    assert node.password not in text + (next((tmp_path / "runs").iterdir()) / "fedmq.toml").read_text()
