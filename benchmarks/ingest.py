"""How fast updates become part of a model, against the same bytes through tuned pika and the same queues.

    python -m benchmarks.ingest --sizes 0.1 1 10 100 --megabytes 2000 --publishers 1

Publishers send updates, each durable and confirmed; the aggregator decodes, checks, folds, commits (a version for
each ten updates, its checkpoint with fsync, its broadcast) and acknowledges them. Measured from the first arrival to
the last acknowledgement, and given as MB a second. "Raw" are the same bytes through the same connections and queues,
each acknowledged when, for each ten of them, as many bytes as a model has are in a file and synced, and with as many
broadcast for each ten: the same durability, with nothing done. "Eager" is the same acknowledged as they come, so that
the broker mostly need not write them to its disk: less is promised. "Stock" is pika's BlockingConnection with whole
bodies, at both ends, eager as well.

Figures, machine and versions: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import queue
import secrets
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pika
from pydantic import SecretStr

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.meter import Meter
from aggregator.process import tune
from aggregator.service import AggregatorService
from benchmarks.echo import model_of, raw_message
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.messages import Reason
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Believe, Delivery, Incoming, Sink, Source, Token

MB = 1_000_000
BUFFER = 10


class Watched(AmqpAggregatorTransport):
    """Notes when the first update comes and when each acknowledgement is given."""

    first = 0.0
    last = 0.0
    acked = 0

    def open(self, sink: Sink, *, wait: float = 0.0, believe: Believe | None = None) -> None:
        """As always, with an ear at the sink."""

        def listen(item: Incoming) -> None:
            if not self.first and isinstance(item, Delivery) and item.source is Source.UPDATE:
                self.first = time.perf_counter()
            sink(item)

        super().open(listen, wait=wait, believe=believe)

    def ack(self, token: Token) -> None:
        """As always, noted."""
        super().ack(token)
        self.acked += 1
        self.last = time.perf_counter()

    def reject(self, token: Token, reason: Reason, detail: str, delivery: Delivery) -> None:
        """Not meant to happen here."""
        del token, delivery
        raise RuntimeError(f"{reason}: {detail}")


@contextlib.contextmanager
def publishers(url: str, run: str, nbytes: int, counts: list[int], *more: str) -> Iterator[None]:
    """Publishers, each a process."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.flood", url, run, f"w{index}", str(nbytes), str(count), *more]
        )
        for index, count in enumerate(counts)
    ]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def serve_fedmq(
    url: str,
    run: str,
    nbytes: int,
    count: int,
    buffer_size: int = BUFFER,
    *,
    strategy: str = "mean",
    meter: Meter | None = None,
) -> float:
    """Seconds for so many updates."""
    model = model_of(nbytes)
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "checkpoints", run)
        store.create(model, {t.name: np.zeros(t.shape, np.float32) for t in model.tensors}, now=0.0)
        settings = AggregatorConfig(
            buffer_size=buffer_size, strategy=strategy, max_staleness=10**9, staleness="constant", linger=0.0
        )
        service = AggregatorService(folder=Path(folder), run=run, config=settings, store=store, meter=meter)
        transport = Watched(
            BrokerConfig(url=SecretStr(url)),
            Topology(run),
            model_bytes=model.nbytes,
            prefetch=settings.prefetch(model.nbytes),
        )
        thread = threading.Thread(target=service.run, args=(transport,), daemon=True)
        thread.start()
        while transport.acked < count:
            time.sleep(0.005)
        service.stop()
        thread.join(60)
    return transport.last - transport.first


class Eager:
    """Acknowledges at once."""

    def __init__(self, transport: Watched) -> None:
        self.take = transport.ack

    def look(self) -> None:
        """Nothing is open."""


class Synced:
    """Acknowledges when a file of the model's size is durable, one for ten updates or for all that came meanwhile."""

    def __init__(self, transport: Watched, nbytes: int, count: int, *, together: int = BUFFER) -> None:
        """``together``: how many updates one file stands for at least, but the last."""
        self._transport = transport
        self._together = together
        self._missing = count
        self._body = bytes(nbytes)
        self._folder = tempfile.TemporaryDirectory()
        self._writer = ThreadPoolExecutor(1)
        self._waiting: list[Token] = []
        self._covered: list[Token] = []
        self._under_way: Future[None] | None = None

    def take(self, token: Token) -> None:
        """An update has come."""
        self._waiting.append(token)
        self._missing -= 1
        self.look()

    def look(self) -> None:
        """Acknowledge what is durable, and go on."""
        if self._under_way is not None and self._under_way.done():
            self._under_way = None
            for token in self._covered:
                self._transport.ack(token)
        is_enough = len(self._waiting) >= self._together or not self._missing
        if self._under_way is None and self._waiting and is_enough:
            self._covered, self._waiting = self._waiting, []
            self._under_way = self._writer.submit(self._write)

    def _write(self) -> None:
        file = Path(self._folder.name) / "model"
        with file.with_suffix(".new").open("wb") as stream:
            stream.write(self._body)
            stream.flush()
            os.fsync(stream.fileno())
        file.with_suffix(".new").replace(file)


def serve_raw(url: str, run: str, nbytes: int, count: int, *, eager: bool = False) -> float:
    """The same bytes, and nothing done to them."""
    settings = AggregatorConfig()
    inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
    transport = Watched(
        BrokerConfig(url=SecretStr(url)), Topology(run), model_bytes=nbytes, prefetch=settings.prefetch(nbytes)
    )
    acks = Eager(transport) if eager else Synced(transport, nbytes, count)
    transport.open(inbox.put, wait=30)
    for index in range(64):
        transport.admit(f"w{index}")
    waiting: list[Delivery] = []
    taken = version = 0
    while transport.acked < count:
        if not eager and taken == BUFFER:
            taken, version = 0, version + 1
            transport.broadcast(raw_message(nbytes, f"{run}/1/{version}", epoch=1, version=version))
        acks.look()
        try:
            item = inbox.get(timeout=0.001)
        except queue.Empty:
            continue
        if not isinstance(item, Delivery) or item.source is not Source.UPDATE or item.token is None:
            continue
        if "chunks" not in item.headers:
            acks.take(item.token)
            taken += 1
        elif item.chunks is None:
            waiting.append(item)
            if len(waiting) == 1:
                transport.fetch(item)
        else:
            waiting.pop(0)
            if waiting:
                transport.fetch(waiting[0])
            acks.take(item.token)
            taken += 1
    transport.close()
    return transport.last - transport.first


def serve_eager(url: str, run: str, nbytes: int, count: int) -> float:
    """The same bytes, acknowledged as they come."""
    return serve_raw(url, run, nbytes, count, eager=True)


def serve_stock(url: str, run: str, nbytes: int, count: int) -> float:
    """pika as it comes."""
    del nbytes
    channel = pika.BlockingConnection(pika.URLParameters(url)).channel()
    channel.basic_qos(prefetch_count=16)
    first = last = 0.0
    for number, (method, _, _) in enumerate(channel.consume(Topology(run).updates), 1):
        first = first or time.perf_counter()
        channel.basic_ack(method.delivery_tag)
        if number == count:
            last = time.perf_counter()
            break
    channel.connection.close()
    return last - first


KINDS = {"fedmq": serve_fedmq, "raw": serve_raw, "eager": serve_eager, "stock": serve_stock}


def measure(url: str, kind: str, nbytes: int, count: int, senders: int) -> float:
    """MB a second."""
    run = f"{kind}-{secrets.token_hex(3)}"
    flags = {"fedmq": [], "stock": ["--stock"]}.get(kind, ["--raw"])
    counts = [count // senders + (index < count % senders) for index in range(senders)]
    command = [sys.executable, "-m", "benchmarks.ingest", "--serve", kind, "--url", url, "--run", run]
    command += ["--nbytes", str(nbytes), "--count", str(count)]
    if kind == "stock":
        setup = AmqpAggregatorTransport(BrokerConfig(url=SecretStr(url)), Topology(run), model_bytes=1000, prefetch=1)
        setup.open(lambda _item: None, wait=30)
        setup.close()
    with publishers(url, run, nbytes, counts, *flags):
        output = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=300).stdout
    return (count - 1) * nbytes / MB / float(json.loads(output))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 1, 10, 100], help="MB of an update")
    parser.add_argument("--megabytes", type=float, default=2000, help="in all, for each figure")
    parser.add_argument("--publishers", type=int, default=1)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--serve", choices=sorted(KINDS), help=argparse.SUPPRESS)
    parser.add_argument("--url", help="a RabbitMQ; a private node if not given")
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--nbytes", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--count", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    if arguments.serve:
        tune()
        print(KINDS[arguments.serve](arguments.url, arguments.run, arguments.nbytes, arguments.count))
        return
    with contextlib.ExitStack() as stack:
        url = arguments.url or stack.enter_context(PrivateNode()).url
        print("| MB | fedmq MB/s (median, min-max) | raw MB/s | fedmq / raw | eager MB/s | stock pika MB/s |")
        print("| --- | --- | --- | --- | --- | --- |", flush=True)
        for size in arguments.sizes:
            nbytes = int(size * MB) // 4 * 4
            # Whole rounds, so that all of them become durable.
            count = max(2, min(4000, round(arguments.megabytes / size / BUFFER))) * BUFFER
            if size >= 50:
                count = max(1, round(arguments.megabytes / size / BUFFER)) * BUFFER
            rates: dict[str, list[float]] = {kind: [] for kind in KINDS}
            for _ in range(arguments.repeat):
                for kind, found in rates.items():
                    # Stock pika is shown whole bodies of 100 MB only once: it takes its time.
                    if kind != "stock" or not found or size < 50:
                        found.append(measure(url, kind, nbytes, count, arguments.publishers))
            ours, raw, eager, stock = (statistics.median(rates[kind]) for kind in ("fedmq", "raw", "eager", "stock"))
            spread = f"{ours:.0f} ({min(rates['fedmq']):.0f}-{max(rates['fedmq']):.0f})"
            spread_raw = f"{raw:.0f} ({min(rates['raw']):.0f}-{max(rates['raw']):.0f})"
            print(f"| {size:g} | {spread} | {spread_raw} | {ours / raw:.2f} | {eager:.0f} | {stock:.0f} |", flush=True)


if __name__ == "__main__":
    main()
