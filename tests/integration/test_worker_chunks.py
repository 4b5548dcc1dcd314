"""Workers whose model takes many chunks, on RabbitMQ: cut, slow, late, and asked to leave in the middle."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.history import read_history
from aggregator.results import Outcome
from aggregator.service import AggregatorService
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.amqp.upload import WINDOW
from broker.topology import UPDATES
from tests.support.node import channel, config_of, drain, fresh_topology
from tests.support.proxy import Direction, Proxy
from tests.support.site import Site
from tests.support.waiting import wait_for
from worker_client.client import Summary, run_worker
from worker_client.config import WorkerConfig
from worker_client.task import Shard, Task
from worker_client.training import initial_parameters

pytestmark = pytest.mark.broker

LONG = 120.0
CHUNK = 65_536


class Large(Task):
    """2 MB of parameters, in 33 chunks; a step of it takes a moment."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(8, 16_000), nn.Tanh(), nn.Linear(16_000, 24))

    def data(self, shard: Shard) -> TensorDataset:
        random = torch.Generator().manual_seed(shard.index)
        return TensorDataset(torch.randn(8, 8, generator=random), torch.randint(0, 24, (8,), generator=random))


MODEL, PARAMETERS = initial_parameters(Large())
CHUNKS = 33


class Place:
    """A run with its aggregator and workers as threads of this process."""

    def __init__(self, node: PrivateNode, folder: Path, *, chunk_bytes: int = CHUNK, **settings: Any) -> None:
        self.node, self.folder, self.chunk_bytes = node, folder, chunk_bytes
        self.topology = fresh_topology("large")
        self.store = CheckpointStore(folder / "checkpoints", self.topology.run)
        self.store.create(MODEL, PARAMETERS, now=0.0)
        self.config = AggregatorConfig(linger=3.0, **settings)
        self.stop = threading.Event()
        self.summaries: dict[str, Summary] = {}
        self.outcome: Outcome | None = None
        self.errors: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        store = CheckpointStore(self.store.folder, self.topology.run)
        self.service = AggregatorService(
            folder=folder, run=self.topology.run, config=self.config, store=store, chunk_bytes=chunk_bytes
        )

    def aggregate(self) -> None:
        def work() -> None:
            size = MODEL.nbytes
            transport = AmqpAggregatorTransport(
                config_of(self.node), self.topology, model_bytes=size, prefetch=self.config.prefetch(size)
            )
            self.outcome = self.service.run(transport)

        self._start(work)

    def work(self, name: str, url: str = "", **settings: Any) -> AmqpWorkerTransport:
        shard = f"{int(name[1:])}/4"
        config = WorkerConfig(name=name, shard=shard, device="cpu", heartbeat_seconds=0.2, **settings)
        transport = AmqpWorkerTransport(config_of(self.node, url=url), self.topology, worker=name)

        def work() -> None:
            self.summaries[name] = run_worker(
                config, self.topology.run, transport, Large(), chunk_bytes=self.chunk_bytes, stop=self.stop
            )

        self._start(work)
        return transport

    def _start(self, work: Any) -> None:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # noqa: BLE001 (handed to the test)
                self.errors.append(error)

        self._threads.append(threading.Thread(target=run, daemon=True))
        self._threads[-1].start()

    def join(self) -> None:
        for thread in self._threads:
            thread.join(LONG)
            assert not thread.is_alive(), f"still running; errors so far: {self.errors}"
        assert self.errors == []

    @property
    def versions(self) -> list[dict[str, Any]]:
        lines = read_history(self.folder / "history.jsonl")
        return [line for line in lines if line["kind"] == "version"]

    def bases(self, worker: str) -> list[int]:
        """From which versions the updates of ``worker`` that are applied were trained."""
        updates = [(line["version"] - 1 - u["staleness"], u) for line in self.versions for u in line["updates"]]
        return [base for base, update in updates if update["worker"] == worker]


@contextlib.contextmanager
def place_of(node: PrivateNode, folder: Path, **settings: Any) -> Iterator[Place]:
    place = Place(node, folder, **settings)
    try:
        yield place
    finally:
        place.stop.set()
        place.service.stop()
        for thread in place._threads:
            thread.join(LONG)


@contextlib.contextmanager
def tap(node: PrivateNode, place: Place, worker: str) -> Iterator[str]:
    """A queue with a copy of each chunk of an update that ``worker`` publishes."""
    queue = f"tap-{place.topology.run}"
    with channel(node) as inside:
        inside.exchange_declare(UPDATES, "topic", durable=True)
        inside.queue_declare(queue, durable=True)
        inside.queue_bind(queue, UPDATES, place.topology.chunk_key(worker))
    yield queue
    with channel(node) as inside:
        inside.queue_delete(queue)


def test_a_run_in_chunks_makes_bit_for_bit_what_it_makes_in_single_messages(node: PrivateNode, tmp_path: Path) -> None:
    results = []
    for chunk_bytes in (CHUNK, 2**23):
        folder = tmp_path / str(chunk_bytes)
        settings = {"rounds": "synchronous", "minimum_updates": 2, "stop_after_rounds": 3}
        with place_of(node, folder, chunk_bytes=chunk_bytes, **settings) as place, tap(node, place, "w0") as queue:
            place.aggregate()
            for name in ("w0", "w1"):
                place.work(name)
            place.join()
            # Three updates of all their chunks, or none.
            assert len(drain(node, queue)) == (3 * CHUNKS if chunk_bytes == CHUNK else 0)
            assert place.outcome is not None
            assert (place.outcome.applied, place.outcome.confirmed, place.outcome.rejected) == (6, 6, {})
            results.append(dict(place.store.load().parameters))

    one, other = results
    for name, array in one.items():
        assert np.array_equal(array, other[name])
        assert not np.array_equal(array, PARAMETERS[name])


def test_an_upload_goes_on_where_its_connection_was_cut(node: PrivateNode, tmp_path: Path) -> None:
    with (
        Proxy.to(node.url) as proxy,
        place_of(node, tmp_path, buffer_size=1, stop_after_rounds=1) as place,
        tap(node, place, "w0") as queue,
    ):
        cut = proxy.cut_after(MODEL.nbytes // 2)
        place.work("w0", proxy.url(node.url))
        place.aggregate()
        place.join()

        assert cut.happened.is_set()
        published = Counter(str(properties.message_id) for properties, _ in drain(node, queue))
        assert len(published) == CHUNKS
        assert sum(published.values()) <= CHUNKS + WINDOW, "only what was on its way is sent again"
        assert [len(line["updates"]) for line in place.versions] == [1]


def test_a_download_goes_on_where_its_connection_was_cut(node: PrivateNode, tmp_path: Path) -> None:
    with Proxy.to(node.url) as proxy, place_of(node, tmp_path, buffer_size=1, stop_after_rounds=1) as place:
        cut = proxy.cut_after(MODEL.nbytes * 3 // 4, direction=Direction.DOWN)
        place.work("w0", proxy.url(node.url))
        place.aggregate()
        place.join()

        assert cut.happened.is_set()
        # From its beginning it would be seven quarters, and a little for everything else.
        assert proxy.carried[Direction.DOWN] < MODEL.nbytes * 1.5


@pytest.mark.parametrize("side", ["upload", "download"])
def test_connections_that_are_dropped_again_and_again_do_not_keep_a_worker(
    side: str, node: PrivateNode, tmp_path: Path
) -> None:
    direction = Direction.UP if side == "upload" else Direction.DOWN
    with Proxy.to(node.url) as proxy, place_of(node, tmp_path, buffer_size=1, stop_after_rounds=1) as place:
        cuts = [proxy.cut_after(MODEL.nbytes // 3, direction=direction) for _ in range(2)]
        transport = place.work("w0", proxy.url(node.url))
        place.aggregate()
        wait_for(cuts[0].happened.is_set, LONG, what="a cut")
        transport.drop()
        place.join()

        assert place.summaries["w0"].confirmed == 1
        assert [len(line["updates"]) for line in place.versions] == [1]


def test_a_slow_link_gets_whole_versions_and_makes_progress_while_they_come_faster(
    node: PrivateNode, tmp_path: Path
) -> None:
    settings = {"buffer_size": 1, "max_staleness": 10_000}
    with Proxy.to(node.url) as proxy, place_of(node, tmp_path, **settings) as place:
        place.aggregate()
        place.work("w0", delay=0.05)
        wait_for(lambda: len(place.versions) >= 3, LONG, what="versions before the late one joins")
        # A version in pieces of 64 KiB at most, each of which waits: it takes longer than the others make two.
        proxy.delay(0.03)
        place.work("w1", proxy.url(node.url))
        wait_for(lambda: len(place.bases("w1")) >= 3, LONG, what="three updates over a slow link")

        bases = place.bases("w1")
        assert bases == sorted(bases)
        assert bases[0] >= 2, "a late joiner begins with the newest"
        assert place.errors == []
        place.stop.set()
        proxy.heal()


# ------------------------------------------------------------------------------------------------------- SIGTERM


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["download", "upload"])
def test_who_is_asked_to_leave_in_the_middle_leaves(moment: str, node: PrivateNode, tmp_path: Path) -> None:
    settings: dict[str, dict[str, Any]] = {
        "broker": {"chunk_bytes": CHUNK},
        "worker": {"task": "tests.support.tasks:TEN_MB", "delay": 1.0},
    }
    with Proxy.to(node.url) as proxy, Site(tmp_path, node.url, workers=1, settings=settings, prefix="leave") as place:
        assert place.command("init").wait(LONG) == 0, place.log()
        aggregator = place.command("aggregator")
        wait_for(lambda: "leads run" in place.log(), LONG, what="an aggregator that leads")
        if moment == "download":
            proxy.delay(0.5)
        # Verbose, so that it says when it trains.
        own = ("--name", "w0", "--shard", "0/1", "--verbose")
        worker = place.command("worker", *own, url=proxy.url(node.url), log="w0")
        wait_for(lambda: "downloading version 0" in place.log("w0"), LONG, what="a download")
        carried = dict(proxy.carried)
        if moment == "upload":
            wait_for(lambda: "training from version 0" in place.log("w0"), LONG, what="a training")
            carried = dict(proxy.carried)
            proxy.delay(0.5)
            wait_for(lambda: proxy.carried[Direction.UP] > carried[Direction.UP] + 3 * CHUNK, LONG, what="chunks")
        else:
            wait_for(lambda: proxy.carried[Direction.DOWN] > carried[Direction.DOWN] + 3 * CHUNK, LONG, what="chunks")

        worker.send_signal(signal.SIGTERM)
        assert worker.wait(LONG) == 0, place.log("w0")[-3000:]
        assert "leaves: stopped" in place.log("w0")
        assert "Traceback" not in place.log("w0")
        assert place.version() == 0
        proxy.heal()

        # And whoever comes next has a whole update there.
        second = place.worker(0, log="w0")
        wait_for(lambda: place.confirmed(0) >= 1, LONG, what="an update of its next life")
        wait_for(lambda: place.store.load().entries or place.version(), LONG, what="that it counts")
        for process in (second, aggregator):
            process.send_signal(signal.SIGTERM)
            assert process.wait(LONG) == 0, place.log()[-3000:]
