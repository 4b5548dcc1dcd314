"""The benchmarks run, at sizes that say nothing: so that they still do when somebody wants their figures."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode

pytestmark = pytest.mark.broker

ROOT = Path(__file__).parents[2]


def lines_of(*command: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, timeout=170, check=False
    )
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if line.startswith("| ") and "---" not in line]


def test_rounds(node: PrivateNode, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    sizes = ["--sizes", "0.01", "5"]
    lines = lines_of(
        "benchmarks.rounds", *sizes, "--workers", "2", "--rounds", "2", "--url", node.url, "--json", str(file)
    )
    assert len(lines) == 3
    assert [row["megabytes"] for row in json.loads(file.read_text())] == [0.01, 5]


def test_ingest(node: PrivateNode) -> None:
    assert (
        len(lines_of("benchmarks.ingest", "--sizes", "5", "--megabytes", "1", "--repeat", "1", "--url", node.url)) == 2
    )


def test_monitoring(node: PrivateNode) -> None:
    sizes = ["--updates", "40", "--repeat", "1", "--kinds", "watched"]
    lines = lines_of("benchmarks.monitoring", *sizes, "--url", node.url)
    assert [line.split(" | ")[1] for line in lines[1:]] == ["nothing", "watched"]


def test_memory(node: PrivateNode) -> None:
    sizes = ["--megabytes", "5", "--buffers", "2", "--publishers", "2"]
    assert len(lines_of("benchmarks.memory", *sizes, "--url", node.url)) == 3


def test_workers(node: PrivateNode) -> None:
    counts = ["--workers", "2", "12", "--updates", "24", "--repeat", "1"]
    assert len(lines_of("benchmarks.workers", *counts, "--url", node.url)) == 3


def test_accuracy(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    arguments = ["--tasks", "digits", "--codecs", "topk:0.01", "--seeds", "2", "--versions", "1"]
    assert len(lines_of("benchmarks.accuracy", *arguments, "--json", str(file))) == 3
    plain, coded = json.loads(file.read_text())
    assert (plain["codec"], plain["difference"], coded["codec"]) == ("", 0, "topk:0.01")
    assert coded["megabytes_up"] < plain["megabytes_up"] / 2


def test_all_of_them_leave_their_results_in_a_folder(tmp_path: Path) -> None:
    lines_of("benchmarks", "--quick", "--only", "codecs", "--into", str(tmp_path))
    content = (tmp_path / "codecs.md").read_text()
    assert content.startswith("`python -m benchmarks.codecs --elements 65536 --repeats 1`, ")
    assert re.search(r"RabbitMQ \d+\.\d+", content)
    assert "| eden:4 |" in content
