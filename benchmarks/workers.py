"""Updates a second with few and with many connected workers, against the same bytes with nothing done to them.

    python -m benchmarks.workers --workers 4 50 200 --megabytes 0.1 --updates 4000

Every worker has its connections, hears of every version, and has one update on its way at a time. A version for as
many updates as there are workers (at least ten), with its checkpoint and its broadcast. "Raw" are the same bytes
through the same connections and queues, and a version's worth of bytes broadcast as often; the updates are acknowledged
when as many bytes as a version has are in a file and synced, as often as fedmq writes a checkpoint. Workers live in
processes of up to fifty, so that two hundred fit on a machine.

Figures, machine and versions: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import secrets
import statistics
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from queue import Empty, SimpleQueue

from pydantic import SecretStr

from aggregator.config import AggregatorConfig
from aggregator.process import tune
from benchmarks.echo import raw_message
from benchmarks.ingest import BUFFER, MB, Synced, Watched, serve_fedmq
from broker.amqp.node import PrivateNode
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Delivery, Incoming, Source

#: Workers in one process.
CROWD = 50
SECONDS = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Updates a second, the median."""

    workers: int
    fedmq: float
    raw: float
    ratio: float


def serve_raw(url: str, run: str, nbytes: int, count: int, buffer_size: int) -> float:
    """Seconds for so many updates' worth of bytes."""
    inbox: SimpleQueue[Incoming] = SimpleQueue()
    prefetch = AggregatorConfig().prefetch(nbytes)
    transport = Watched(BrokerConfig(url=SecretStr(url)), Topology(run), model_bytes=nbytes, prefetch=prefetch)
    acks = Synced(transport, nbytes, count, together=min(buffer_size, AggregatorConfig().commit_count))
    transport.open(inbox.put, wait=30)
    taken = 0
    while transport.acked < count:
        acks.look()
        try:
            item = inbox.get(timeout=0.001)
        except Empty:
            continue
        if isinstance(item, Delivery) and item.source is Source.UPDATE and item.token is not None:
            acks.take(item.token)
            taken += 1
            version, rest = divmod(taken, buffer_size)
            if not rest:
                transport.broadcast(raw_message(nbytes, f"{run}/1/{version}", epoch=1, version=version))
    transport.close()
    return transport.last - transport.first


@contextlib.contextmanager
def crowds(url: str, run: str, workers: int, nbytes: int, updates: int, *more: str) -> Iterator[None]:
    """So many workers, which all begin at once when all are there."""
    firsts = range(0, workers, CROWD)
    processes = []
    for index, first in enumerate(firsts):
        numbers = first, min(CROWD, workers - first), nbytes, updates // len(firsts) + (index < updates % len(firsts))
        command = [sys.executable, "-m", "benchmarks.crowd", url, run, *map(str, numbers), *more]
        processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
    try:
        for process in processes:
            if process.stdout is None or process.stdout.readline() != "ready\n":
                raise RuntimeError("workers could not connect")
        for process in processes:
            if process.stdin is not None:
                process.stdin.write("go\n")
                process.stdin.flush()
        yield
        for process in processes:
            process.wait(60)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def measure(url: str, kind: str, workers: int, nbytes: int, updates: int) -> float:
    """Updates a second."""
    run, buffer_size = f"{kind}-{secrets.token_hex(3)}", max(BUFFER, workers)
    count = max(1, updates // buffer_size) * buffer_size  # whole rounds, so that all of them become durable
    command = [sys.executable, "-m", "benchmarks.workers", "--serve", kind, "--url", url, "--run", run]
    command += ["--nbytes", str(nbytes), "--updates", str(count), "--workers", str(buffer_size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            with crowds(url, run, workers, nbytes, count, *(["--raw"] if kind == "raw" else [])):
                output, _ = server.communicate(timeout=SECONDS)
        finally:
            server.kill()
    return (count - 1) / float(json.loads(output))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[4, 50, 200])
    parser.add_argument("--megabytes", type=float, default=0.1, help="of an update")
    parser.add_argument("--updates", type=int, default=4000)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--url", help="a RabbitMQ; a private node if not given")
    parser.add_argument("--serve", choices=["raw", "fedmq"], help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--nbytes", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.serve:
        tune()
        serve = serve_raw if arguments.serve == "raw" else serve_fedmq
        print(serve(arguments.url, arguments.run, arguments.nbytes, arguments.updates, arguments.workers[0]))
        return
    rows = []
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(PrivateNode()).url
        print("| workers | fedmq updates/s (median, min-max) | raw updates/s | fedmq / raw |")
        print("| --- | --- | --- | --- |", flush=True)
        for workers in arguments.workers:
            rates: dict[str, list[float]] = {"raw": [], "fedmq": []}
            for _ in range(arguments.repeat):
                for kind, found in rates.items():
                    nbytes = int(arguments.megabytes * MB) // 4 * 4
                    found.append(measure(url, kind, workers, nbytes, arguments.updates))
            ours, raw = (statistics.median(rates[kind]) for kind in ("fedmq", "raw"))
            rows.append(Row(workers=workers, fedmq=ours, raw=raw, ratio=ours / raw))
            spreads = [f"{min(rates[kind]):.0f}-{max(rates[kind]):.0f}" for kind in ("fedmq", "raw")]
            shown = f"{ours:.0f} ({spreads[0]}) | {raw:.0f} ({spreads[1]})"
            print(f"| {workers} | {shown} | {ours / raw:.2f} |", flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


if __name__ == "__main__":
    main()
