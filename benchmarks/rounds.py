"""Seconds a round: workers that echo the parameters at once, everything durable, against the raw pipe.

    python -m benchmarks.rounds --sizes 0.1 1 10 100 --workers 4 --rounds 20

A round is from one version's commit to the next: broadcast, four downloads, four uploads, decoded, checked, folded,
checkpoint with fsync, acknowledgements. The raw pipe moves the same bytes through the same queues, streams and
connections of the same node in the same run, in the same number of processes, every message durable and confirmed;
it decodes, folds and stores nothing. Each worker is a process, and so is the aggregator.

Figures, machine and versions: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import logging
import resource
import secrets
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from pydantic import SecretStr

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.history import read_history
from aggregator.process import tune
from aggregator.service import AggregatorService
from benchmarks.echo import model_of, raw_message
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Delivery, Incoming, Outgoing, Source

MB = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One size's figures, in seconds a round."""

    megabytes: float
    fedmq: float
    fedmq_least: float
    fedmq_most: float
    raw: float
    raw_least: float
    raw_most: float
    ratio: float
    aggregator_peak_mb: float


@contextlib.contextmanager
def echoes(url: str, run: str, nbytes: int, workers: int, *more: str) -> Iterator[None]:
    """So many echoing workers, each a process, which wait for the run."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.echo", url, run, f"w{index}", str(nbytes), *more],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(workers)
    ]
    try:
        yield
        for process in processes:
            process.wait(30)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def serve_fedmq(url: str, run: str, nbytes: int, workers: int, rounds: int) -> list[float]:
    """Lead a run for so many rounds; the seconds of each."""
    model = model_of(nbytes)
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "checkpoints", run)
        store.create(model, {t.name: np.zeros(t.shape, np.float32) for t in model.tensors}, now=0.0)
        settings = AggregatorConfig(
            rounds="synchronous", minimum_updates=workers, stop_after_rounds=rounds + 1, linger=0.0, weighting="uniform"
        )
        service = AggregatorService(folder=Path(folder), run=run, config=settings, store=store)
        config = BrokerConfig(url=SecretStr(url))
        service.run(
            AmqpAggregatorTransport(
                config, Topology(run), model_bytes=model.nbytes, prefetch=settings.prefetch(model.nbytes)
            )
        )
        times = [line["time"] for line in read_history(Path(folder) / "history.jsonl") if line["kind"] == "version"]
    return [after - before for before, after in itertools.pairwise(times)]


def serve_raw(url: str, run: str, nbytes: int, workers: int, rounds: int) -> list[float]:
    """The same bytes through the same queues, and nothing else."""
    topology = Topology(run)
    inbox: SimpleQueue[Incoming] = SimpleQueue()
    aggregator = AmqpAggregatorTransport(
        BrokerConfig(url=SecretStr(url)), topology, model_bytes=nbytes, prefetch=2 * workers
    )
    aggregator.open(inbox.put, wait=20)
    for index in range(workers):
        aggregator.admit(f"w{index}")
    times = []
    for version in range(rounds + 1):
        started = time.perf_counter()
        done = aggregator.broadcast(raw_message(nbytes, f"{run}/1/{version}", epoch=1, version=version))
        count = 0
        while count < workers:
            item = inbox.get()
            if not isinstance(item, Delivery) or item.source is not Source.UPDATE or item.token is None:
                continue
            if "chunks" in item.headers and item.chunks is None:
                aggregator.fetch(item)
                continue
            aggregator.ack(item.token)
            count += 1
        done.result()
        times.append(time.perf_counter() - started)
    aggregator.broadcast(Outgoing(body=b"", headers={"epoch": 1, "version": rounds + 1, "done": 1})).result()
    aggregator.close()
    return times[1:]


def measure(url: str, megabytes: float, workers: int, rounds: int) -> Row:
    """One size."""
    nbytes = int(megabytes * MB) // 4 * 4
    figures: dict[str, list[float]] = {}
    peak = 0.0
    for kind in ("raw", "fedmq"):
        run = f"{kind}-{secrets.token_hex(3)}"
        with echoes(url, run, nbytes, workers, *(["--raw"] if kind == "raw" else [])):
            command = [sys.executable, "-m", "benchmarks.rounds", "--serve", kind, "--url", url, "--run", run]
            command += ["--sizes", str(megabytes), "--workers", str(workers), "--rounds", str(rounds)]
            answer = json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600).stdout)
            figures[kind] = answer["seconds"]
            peak = answer["peak_mb"]
    ours, raw = figures["fedmq"], figures["raw"]
    return Row(
        megabytes=megabytes,
        fedmq=statistics.median(ours),
        fedmq_least=min(ours),
        fedmq_most=max(ours),
        raw=statistics.median(raw),
        raw_least=min(raw),
        raw_most=max(raw),
        ratio=statistics.median(ours) / statistics.median(raw),
        aggregator_peak_mb=peak,
    )


def shown(row: Row) -> str:
    """A line of the table."""
    ours = f"{row.fedmq:.4f} ({row.fedmq_least:.4f}-{row.fedmq_most:.4f})"
    raw = f"{row.raw:.4f} ({row.raw_least:.4f}-{row.raw_most:.4f})"
    return f"| {row.megabytes:g} | {ours} | {raw} | {row.ratio:.2f} | {row.aggregator_peak_mb:.0f} |"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 1, 10, 100], help="MB of a model")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--serve", choices=["raw", "fedmq"], help=argparse.SUPPRESS)
    parser.add_argument("--url", help="a RabbitMQ; a private node if not given")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.serve:
        tune()
        serve = serve_raw if arguments.serve == "raw" else serve_fedmq
        nbytes = int(arguments.sizes[0] * MB) // 4 * 4
        seconds = serve(arguments.url, arguments.run, nbytes, arguments.workers, arguments.rounds)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / MB
        print(json.dumps({"seconds": seconds, "peak_mb": peak}))
        return
    rows = []
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(PrivateNode()).url
        print("| MB | fedmq s/round (median, min-max) | raw pipe s/round | ratio | aggregator peak MB |")
        print("| --- | --- | --- | --- | --- |", flush=True)
        for size in arguments.sizes:
            rows.append(measure(url, size, arguments.workers, arguments.rounds))
            print(shown(rows[-1]), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
