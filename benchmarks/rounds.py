"""Seconds a round: workers that echo the parameters at once, everything durable, against the raw pipe.

    python benchmarks/rounds.py --sizes 0.1 1 10 --workers 4 --rounds 20

The raw pipe moves the same bytes through the same queues of the same node in the same run: the workers' updates
published and confirmed one after the other, consumed and acknowledged; then one copy of the parameters confirmed
on the fanout and read from the stream by each worker. It decodes, folds and stores nothing.

Figures, machine and versions: docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import itertools
import logging
import secrets
import statistics
import tempfile
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from queue import SimpleQueue

import numpy as np
from pydantic import SecretStr

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.history import read_history
from aggregator.service import AggregatorService
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.messages import ModelSpec, Parameters, TensorSpec, Update, UpdateId
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Delivery, Incoming, Outgoing, Source
from broker.wire import decode, encode

MB = 1_000_000


def echo(config: BrokerConfig, topology: Topology, name: str, model: ModelSpec, stop: threading.Event) -> None:
    """A worker without training: each new version is answered with an update of the same size."""
    inbox: SimpleQueue[Incoming] = SimpleQueue()
    transport = AmqpWorkerTransport(config, topology, worker=name)
    transport.open(inbox.put)
    tensors = {t.name: np.full(t.shape, 1e-3, np.float32) for t in model.tensors}
    seq = 0
    while not stop.is_set():
        item = inbox.get()
        if not isinstance(item, Delivery) or item.source is not Source.PARAMETERS:
            continue
        version = decode(item.body)
        if not isinstance(version, Parameters) or version.plan.done:
            break
        update = Update(
            run=topology.run,
            id=UpdateId(name, "bench", seq),
            base_version=version.version,
            base_epoch=version.epoch,
            mode=version.plan.mode,
            examples=1,
            model=model,
            tensors=tensors,
        )
        seq += 1
        transport.publish(Outgoing(body=encode(update), message_id=str(update.id))).result()
    transport.close()


def fedmq_rounds(config: BrokerConfig, model: ModelSpec, workers: int, rounds: int) -> list[float]:
    """Seconds of each round, from one version's commit to the next."""
    topology = Topology(f"bench-{secrets.token_hex(3)}")
    with tempfile.TemporaryDirectory() as folder:
        store = CheckpointStore(Path(folder) / "checkpoints", topology.run)
        store.create(model, {t.name: np.zeros(t.shape, np.float32) for t in model.tensors}, now=0.0)
        settings = AggregatorConfig(
            rounds="synchronous", minimum_updates=workers, stop_after_rounds=rounds, linger=0.0, weighting="uniform"
        )
        service = AggregatorService(folder=Path(folder), run=topology.run, config=settings, store=store)
        stop = threading.Event()
        threads = [
            threading.Thread(target=echo, args=(config, topology, f"w{i}", model, stop), daemon=True)
            for i in range(workers)
        ]
        for thread in threads:
            thread.start()
        service.run(
            AmqpAggregatorTransport(
                config, topology, model_bytes=model.nbytes, prefetch=settings.prefetch(model.nbytes)
            )
        )
        for thread in threads:
            thread.join(30)
        times = [line["time"] for line in read_history(Path(folder) / "history.jsonl") if line["kind"] == "version"]
    return [after - before for before, after in itertools.pairwise(times)]


def raw_rounds(config: BrokerConfig, nbytes: int, workers: int, rounds: int) -> list[float]:
    """The same bytes through the same queues, and nothing else."""
    topology = Topology(f"raw-{secrets.token_hex(3)}")
    body = secrets.token_bytes(1024) * (nbytes // 1024 + 1)
    inbox: SimpleQueue[Incoming] = SimpleQueue()
    aggregator = AmqpAggregatorTransport(config, topology, model_bytes=nbytes, prefetch=2 * workers)
    aggregator.open(inbox.put, wait=20)

    def answer(name: str, ready: threading.Barrier) -> None:
        mine: SimpleQueue[Incoming] = SimpleQueue()
        transport = AmqpWorkerTransport(config, topology, worker=name)
        transport.open(mine.put, wait=20)
        ready.wait()
        seen = 0
        while seen < rounds:
            item = mine.get()
            if isinstance(item, Delivery) and item.source is Source.PARAMETERS:
                seen += 1
                transport.publish(Outgoing(body=body)).result()
        transport.close()

    ready = threading.Barrier(workers + 1)
    threads = [threading.Thread(target=answer, args=(f"w{i}", ready), daemon=True) for i in range(workers)]
    for thread in threads:
        thread.start()
    ready.wait()
    times = []
    for version in range(rounds):
        started = time.perf_counter()
        done: Future[None] = aggregator.broadcast(Outgoing(body=body, headers={"epoch": 1, "version": version}))
        count = 0
        while count < workers:
            item = inbox.get()
            if isinstance(item, Delivery) and item.source is Source.UPDATE and item.token is not None:
                aggregator.ack(item.token)
                count += 1
        done.result()
        times.append(time.perf_counter() - started)
    for thread in threads:
        thread.join(30)
    aggregator.close()
    return times[1:]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=float, nargs="+", default=[0.1, 1, 10], help="MB of a model")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)
    with PrivateNode() as node:
        config = BrokerConfig(url=SecretStr(node.url))
        print("| MB | fedmq s/round (median, min-max) | raw pipe s/round | ratio |\n| --- | --- | --- | --- |")
        for size in arguments.sizes:
            model = ModelSpec((TensorSpec("w", (int(size * MB) // 4,), "float32"),))
            raw = raw_rounds(config, model.nbytes, arguments.workers, arguments.rounds)
            ours = fedmq_rounds(config, model, arguments.workers, arguments.rounds)
            middle, base = statistics.median(ours), statistics.median(raw)
            spread = f"{middle:.4f} ({min(ours):.4f}-{max(ours):.4f})"
            print(
                f"| {size:g} | {spread} | {base:.4f} ({min(raw):.4f}-{max(raw):.4f}) | {middle / base:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
