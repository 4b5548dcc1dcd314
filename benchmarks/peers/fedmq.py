"""fedmq itself: ``python -m benchmarks.rounds --json``, which starts its broker, aggregator and workers.

The aggregator's memory is what that says; the broker's, which is as much a part of the server's side, is watched here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.peers.processes import Group, Memory, descendants
from benchmarks.peers.trial import MB, Failure, Outcome, Plan

__all__ = ["HOW", "NAME", "measure_fedmq", "read_row"]

NAME = "fedmq"
HOW = (
    "RabbitMQ as a private node, an aggregator and 4 workers in processes of their own; AMQP without TLS on loopback; "
    "every message durable and confirmed, every version a checkpoint with fsync; memory: the aggregator / with the "
    "broker's own peak added"
)
ROOT = Path(__file__).parents[2]
BROKER = "beam.smp"


def measure_fedmq(mb: float, plan: Plan) -> Outcome:
    """Run the benchmark of rounds for one size; whatever goes wrong becomes the outcome's ``failure``."""
    with Group(Path(tempfile.mkdtemp(prefix="fedmq-peers-"))) as group:
        result = group.folder / "rounds.json"
        command: list[str | Path] = [sys.executable, "-m", "benchmarks.rounds", "--json", result]
        command += ["--sizes", f"{mb:g}", "--workers", str(plan.workers), "--rounds", str(plan.rounds)]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = group.start("rounds", command, side="server", environment=environment, folder=ROOT)
        memory = Memory(partial(descendants, process.pid, BROKER))
        memory.start()
        try:
            code = process.wait(plan.start_limit + (plan.warm_up + plan.rounds) * plan.round_limit)
            if code == 0:
                return read_row(json.loads(result.read_text()), mb, memory.largest)
            print(f"# {NAME}: benchmarks.rounds ended with exit code {code}\n{group.tail()}", file=sys.stderr)
            return Outcome(NAME, mb, failure=f"benchmarks.rounds ended with exit code {code}")
        except subprocess.TimeoutExpired as error:
            return Outcome(NAME, mb, failure=f"benchmarks.rounds took more than {error.timeout:.0f} s")
        except Failure as failure:
            return Outcome(NAME, mb, failure=str(failure))
        finally:
            memory.end()


def read_row(rows: Sequence[Mapping[str, Any]], mb: float, broker: int) -> Outcome:
    """The outcome for a size, out of what ``benchmarks.rounds`` wrote.

    Args:
        rows: what was written.
        mb: the size.
        broker: the broker's peak, in bytes.

    Raises:
        Failure: there is no such row, or it lacks something.
    """
    try:
        row = next(row for row in rows if row["megabytes"] == mb)
        seconds = (row["fedmq_least"], row["fedmq"], row["fedmq_most"])
        aggregator = int(row["aggregator_peak_mb"] * MB)
    except (KeyError, StopIteration, TypeError) as error:
        raise Failure(f"benchmarks.rounds wrote nothing of use about {mb:g} MB: {error!r}") from error
    return Outcome(NAME, mb, seconds, largest=aggregator, together=aggregator + broker)
