"""The benchmarks run, at sizes that say nothing: so that they still do when somebody wants their figures."""

from __future__ import annotations

import json
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


def test_memory(node: PrivateNode) -> None:
    sizes = ["--megabytes", "5", "--buffers", "2", "--publishers", "2"]
    assert len(lines_of("benchmarks.memory", *sizes, "--url", node.url)) == 3
