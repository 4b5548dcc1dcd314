"""The benchmark of the codecs still runs; what it measures is not looked at here."""

from __future__ import annotations

import subprocess
import sys

from tests.support.commands import PATIENCE, ROOT, environment_of


def test_the_benchmark_prints_a_row_for_each_codec() -> None:
    done = subprocess.run(
        [sys.executable, "benchmarks/codecs.py", "--elements", "4096", "--repeats", "1"],
        cwd=ROOT,
        env=environment_of(None),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )

    names = [line.split("|")[1].strip() for line in done.stdout.splitlines()[2:]]
    assert names == ["(copy)", "bf16", "fp16", "int8", "eden:4", "eden:3", "eden:2", "eden:1", "topk:0.1", "topk:0.01"]
