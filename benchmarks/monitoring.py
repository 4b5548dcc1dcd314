"""What it costs the aggregator to be watched: the same ingest with more and more of monitoring.

    python -m benchmarks.monitoring --sizes 0.1 --updates 10000 --repeat 7

As ``benchmarks.ingest``, with

- nothing: no status, no metrics;
- status: the aggregator tells its status about every second, which it always does;
- metrics: it also counts for Prometheus, and nobody asks;
- scraped: Prometheus' page is read each second (Prometheus does it each quarter of a minute);
- watched: and somebody looks at the run with ``fedmq status --watch`` or ``fedmq dashboard``.

Each repetition runs all of them, beginning with another one. Given are the medians, and of each repetition's ratios to
"nothing" the median and the range: of updates a second, and of the seconds of processor that the aggregator's process
takes for an update (from its start to its end), which a busy machine disturbs less.

Figures, machine and versions: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import secrets
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from aggregator import service
from aggregator.metrics import AggregatorMetrics
from aggregator.process import tune
from benchmarks.ingest import BUFFER, MB, publishers, serve_fedmq
from broker.amqp.node import PrivateNode
from broker.metrics import serve as serve_metrics
from broker.settings import BrokerConfig, MetricsConfig
from fedmq.monitoring.watching import watching

KINDS = ("nothing", "status", "metrics", "scraped", "watched")


class Silent(service.StatusTeller):
    """Tells nothing."""

    def note(self, *_arguments: Any) -> None:
        """Of a fact."""

    def tell(self, *_arguments: Any, **_more: Any) -> None:
        """Of who leads."""

    def tell_standby(self, **_more: Any) -> None:
        """Of who stands by."""


def serve(kind: str, url: str, run: str, nbytes: int, count: int, *, port: int) -> tuple[float, float]:
    """Seconds, and seconds of processor, for so many updates."""
    if kind == "nothing":
        service.StatusTeller = Silent  # type: ignore[misc]
    before = time.process_time()
    with contextlib.ExitStack() as stack:
        metrics = None
        if kind in {"metrics", "scraped", "watched"}:
            metrics = AggregatorMetrics(run, Path(tempfile.gettempdir()), workers=100)
            stack.enter_context(serve_metrics(MetricsConfig(port=port), metrics))
        seconds = serve_fedmq(url, run, nbytes, count, meter=metrics)
    return seconds, time.process_time() - before


@contextlib.contextmanager
def scraping(port: int) -> Iterator[None]:
    """Within the block the figures are read each second."""
    over = threading.Event()

    def scrape() -> None:
        while not over.wait(1.0):
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as page:
                page.read()

    thread = threading.Thread(target=scrape, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def measure(url: str, kind: str, nbytes: int, count: int) -> tuple[float, float]:
    """Updates a second, and milliseconds of processor for an update."""
    run = f"{kind}-{secrets.token_hex(3)}"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "benchmarks.monitoring", "--serve", kind, "--url", url, "--run", run]
    command += ["--nbytes", str(nbytes), "--updates", str(count), "--port", str(port)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(publishers(url, run, nbytes, [count]))
        if kind in {"scraped", "watched"}:
            stack.enter_context(scraping(port))
        if kind == "watched":
            stack.enter_context(watching(BrokerConfig(url=SecretStr(url)), run))
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=600).stdout
    seconds, processor = json.loads(output)
    return (count - 1) / seconds, 1000 * processor / count


def compared(values: Mapping[str, list[float]], kind: str) -> str:
    """The median of the ratios to ``nothing``, one for each repetition, and their range."""
    ratios = [one / base for one, base in zip(values[kind], values["nothing"], strict=True)]
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f}-{max(ratios):.3f})"


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1], help="MB of an update")
    parser.add_argument("--updates", type=int, default=10000, help="for each figure")
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--kinds", nargs="+", choices=KINDS[1:], default=KINDS[1:], help="what to compare with nothing")
    parser.add_argument("--serve", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--url", help="a RabbitMQ; a private node if not given")
    for name in ("--nbytes", "--port"):
        parser.add_argument(name, type=int, help=argparse.SUPPRESS)
    parser.add_argument("--run", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.serve:
        tune()
        count, port = arguments.updates, arguments.port
        print(json.dumps(serve(arguments.serve, arguments.url, arguments.run, arguments.nbytes, count, port=port)))
        return
    kinds = (KINDS[0], *arguments.kinds)
    count = max(1, round(arguments.updates / BUFFER)) * BUFFER  # whole rounds, so that all become durable
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(PrivateNode()).url
        print("| MB | with | updates/s | of nothing's | processor ms an update | of nothing's |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        for size in arguments.sizes:
            rates: dict[str, list[float]] = {kind: [] for kind in kinds}
            processor: dict[str, list[float]] = {kind: [] for kind in kinds}
            for turn in range(arguments.repeat):
                for place in range(len(kinds)):
                    kind = kinds[(turn + place) % len(kinds)]
                    rate, milliseconds = measure(url, kind, int(size * MB) // 4 * 4, count)
                    rates[kind].append(rate)
                    processor[kind].append(milliseconds)
            for kind in kinds:
                middle, cost = statistics.median(rates[kind]), statistics.median(processor[kind])
                row = [
                    f"{size:g}",
                    kind,
                    f"{middle:.0f}",
                    compared(rates, kind),
                    f"{cost:.3f}",
                    compared(processor, kind),
                ]
                print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
