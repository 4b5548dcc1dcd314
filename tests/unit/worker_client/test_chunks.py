"""A worker whose model takes several chunks, over the in-process broker."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from torch import nn

from broker.errors import MessageTooLarge, Unroutable
from broker.memory import MemoryBroker, MemoryWorkerTransport
from broker.messages import Event, EventKind, Goodbye, Hello, ModelSpec, Rounds, Update, whole
from broker.settings import CHUNK_BYTES
from broker.transport import Delivery, Outgoing
from broker.wire import CHUNK_OVERHEAD
from tests.support.waiting import wait_for
from tests.unit.worker_client.ends import LIMIT, Aggregator, running
from tests.unit.worker_client.models import RUN, Points
from worker_client.client import run_evaluator
from worker_client.task import Examples, TrainingContext, TrainingResult

#: Chunks of 64 bytes: the model of Points takes six.
TINY = CHUNK_OVERHEAD + 64


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


class Worker(MemoryWorkerTransport):
    """A worker's end that counts what it is asked for, and can hold back what was sent."""

    def __init__(self, broker: MemoryBroker) -> None:
        super().__init__(broker, broker.worker(RUN, "w0")._topology, "w0")
        self.fetched: list[Delivery] = []
        self.published: list[Outgoing] = []
        self.held: list[tuple[Outgoing, Future[None]]] = []
        self.holds = threading.Event()
        self.lose: Callable[[Delivery], bool] = lambda _: False

    def fetch(self, delivery: Delivery, part: range | None = None) -> None:
        self.fetched.append(delivery)
        if not self.lose(delivery):
            super().fetch(delivery, part)

    def publish(self, message: Outgoing) -> Future[None]:
        self.published.append(message)
        if not self.holds.is_set():
            return super().publish(message)
        future: Future[None] = Future()
        self.held.append((message, future))
        return future

    def release(self) -> None:
        """Send what was held back; its chunks are cut only now."""
        message, future = self.held.pop(0)
        sent = super().publish(message)
        assert sent.exception() is None
        future.set_result(None)

    def versions(self) -> list[Any]:
        return [delivery.headers["version"] for delivery in self.fetched]


def same(one: Update, other: Update) -> bool:
    return all(np.array_equal(whole(one.tensors[name]), whole(other.tensors[name])) for name in one.tensors)


def test_in_chunks_the_same_updates_come_as_in_one_message() -> None:
    updates: list[list[Update]] = []
    for size in (CHUNK_BYTES, TINY):
        broker = MemoryBroker()
        aggregator = Aggregator(broker, Points(), chunk_bytes=size)
        with running(broker, Points(), chunk_bytes=size) as worker:
            for version in range(3):
                aggregator.broadcast(version)
                aggregator.wait_for(lambda: len(aggregator.of(Update)) == version + 1)  # noqa: B023
            aggregator.broadcast(3, done=True)
            assert worker.result(LIMIT).confirmed == 3
        assert all(bool(d.chunks) == (size == TINY) for d in aggregator.outgoing if d.headers.get("seq") is not None)
        updates.append(aggregator.of(Update))

    assert len(updates[0]) == len(updates[1]) == 3
    assert all(same(one, other) for one, other in zip(*updates, strict=True))


def test_headers_and_manifest_say_the_same(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    with running(broker, Points(), chunk_bytes=TINY):
        aggregator.broadcast(4)
        [update] = aggregator.wait_for(lambda: aggregator.of(Update))

    headers = next(d.headers for d in aggregator.outgoing if d.chunks)
    assert headers == {
        "run": RUN,
        "worker": "w0",
        "incarnation": update.id.incarnation,
        "seq": 0,
        "base_version": 4,
        "examples": 50,
        "steps": 2,
        "message_id": str(update.id),
        "chunks": 5,
        "bytes": section_bytes(aggregator.model),
    }


def section_bytes(model: ModelSpec) -> int:
    """Each tensor begins at a multiple of 64."""
    position = 0
    for tensor in model.tensors:
        position = -(-position // 64) * 64 + tensor.nbytes
    return position


# ------------------------------------------------------------------------------------------------------- sending


def test_nothing_writes_into_an_update_until_it_is_confirmed(broker: MemoryBroker) -> None:
    """Its chunks are cut when they are sent; their checksums stand in the manifest since it was trained."""
    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    worker = Worker(broker)
    worker.holds.set()
    with running(worker, Points(), chunk_bytes=TINY, max_updates=2) as summary:
        aggregator.broadcast(0)
        wait_for(lambda: worker.held, LIMIT, what="the first update")
        aggregator.tensors = {name: array + 1 for name, array in aggregator.tensors.items()}
        aggregator.broadcast(1)
        wait_for(lambda: beats(aggregator)[-1:] == ["publishing"], LIMIT, what="a second update that waits")
        worker.release()
        wait_for(lambda: worker.held, LIMIT, what="the second update")
        worker.release()
        assert summary.result(LIMIT).confirmed == 2

    assert [(u.id.seq, u.base_version) for u in aggregator.of(Update)] == [(0, 0), (1, 1)]


def beats(aggregator: Aggregator) -> list[str]:
    return [beat.data["state"] for beat in aggregator.of(Event, kind=EventKind.HEARTBEAT)]


@pytest.mark.parametrize("rounds", Rounds)
def test_training_goes_on_beside_an_update_on_its_way_in_buffered_rounds_only(
    broker: MemoryBroker, rounds: Rounds
) -> None:
    trained: list[int] = []

    class Watched(Points):
        def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
            trained.append(context.base_version)
            return super().train(model, dataset, context)

    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    worker = Worker(broker)
    worker.holds.set()
    with running(worker, Watched(), chunk_bytes=TINY):
        aggregator.broadcast(0, rounds=rounds)
        wait_for(lambda: worker.held, LIMIT, what="an update")
        aggregator.tensors = {name: array + 1 for name, array in aggregator.tensors.items()}
        aggregator.broadcast(1, rounds=rounds)
        # Downloaded it is in any case.
        wait_for(lambda: worker.versions() == [0, 1], LIMIT, what="a download")
        if rounds is Rounds.SYNCHRONOUS:
            aggregator.wait_for(lambda: any(b.data["state"] == "publishing" for b in aggregator.of(Event)))
            assert trained == [0]
            worker.release()
        wait_for(lambda: trained == [0, 1], LIMIT, what="a second training")
        worker.holds.clear()


def test_an_update_is_cut_anew_where_the_broker_takes_less_than_was_thought(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    worker = Worker(broker)

    class Lowered(Worker):
        def publish(self, message: Outgoing) -> Future[None]:
            self.published.append(message)
            if len(self.published) > 1:
                return MemoryWorkerTransport.publish(self, message)
            # Somebody has lowered the limit, and the broker says so at the first chunk.
            broker.max_message_bytes = TINY
            refused: Future[None] = Future()
            refused.set_exception(MessageTooLarge(f"the limit is {TINY} bytes"))
            return refused

    worker = Lowered(broker)
    with running(worker, Points(), chunk_bytes=2 * TINY, max_updates=1) as summary:
        aggregator.broadcast(0)
        assert summary.result(LIMIT).confirmed == 1

    first, second = worker.published
    assert first.message_id == second.message_id
    assert len(second.chunks) > len(first.chunks)
    assert [u.id.seq for u in aggregator.of(Update)] == [0]


def test_where_there_is_no_outbox_the_worker_says_hello_again(broker: MemoryBroker) -> None:
    class Without(Worker):
        def publish(self, message: Outgoing) -> Future[None]:
            self.published.append(message)
            if len(self.published) > 1:
                return MemoryWorkerTransport.publish(self, message)
            refused: Future[None] = Future()
            refused.set_exception(Unroutable("no queue is bound"))
            return refused

    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    with running(Without(broker), Points(), chunk_bytes=TINY, max_updates=1) as summary:
        aggregator.broadcast(0)
        assert summary.result(LIMIT).confirmed == 1

    assert [hello.version for hello in aggregator.of(Hello)] == [-1, 0]


# ------------------------------------------------------------------------------------------------------ receiving


def test_a_plan_told_anew_and_a_new_epoch_need_no_download(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    worker = Worker(broker)
    with running(worker, Points(), chunk_bytes=TINY):
        aggregator.broadcast(0)
        aggregator.wait_for(lambda: len(aggregator.of(Update)) == 1)
        aggregator.broadcast(0, attempt=1, updates_per_version=2)
        aggregator.wait_for(lambda: len(aggregator.of(Update)) == 2)
        aggregator.broadcast(0, epoch=2)
        aggregator.wait_for(lambda: len(aggregator.of(Update)) == 3)

    assert worker.versions() == [0]
    assert [(u.base_version, u.base_epoch) for u in aggregator.of(Update)] == [(0, 1), (0, 1), (0, 2)]


def test_a_version_whose_chunks_are_gone_is_asked_for_again_and_a_newer_one_at_once(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    worker = Worker(broker)

    def gone(delivery: Delivery) -> bool:
        if len(worker.fetched) > 2:
            return False
        assert worker.sink is not None
        worker.sink(Delivery(**{**fields_of(delivery), "lost": "3 of 6 chunks are there"}))
        return True

    worker.lose = gone
    with caplog.at_level(logging.WARNING), running(worker, Points(), chunk_bytes=TINY):
        aggregator.broadcast(0)
        [update] = aggregator.wait_for(lambda: aggregator.of(Update))

    assert update.base_version == 0
    assert worker.versions() == [0, 0, 0]
    assert "version 0 cannot be downloaded and is asked for again: 3 of 6 chunks are there" in caplog.text


def fields_of(delivery: Delivery) -> dict[str, Any]:
    return {"source": delivery.source, "body": delivery.body, "headers": delivery.headers}


def test_damaged_chunks_are_not_trained_from(broker: MemoryBroker, caplog: pytest.LogCaptureFixture) -> None:
    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    worker = Worker(broker)

    def damaged(delivery: Delivery) -> bool:
        if len(worker.fetched) > 1:
            return False
        chunks = list(broker.run(RUN).newest.chunks)  # type: ignore[union-attr]
        chunks[2] = chunks[2][:-1] + bytes([chunks[2][-1] ^ 1])
        assert worker.sink is not None
        worker.sink(Delivery(**fields_of(delivery), chunks=tuple(chunks)))
        return True

    worker.lose = damaged
    with caplog.at_level(logging.WARNING), running(worker, Points(), chunk_bytes=TINY):
        aggregator.broadcast(0)
        aggregator.wait_for(lambda: aggregator.of(Update))

    assert worker.versions() == [0, 0]
    assert "does not match its checksum" in caplog.text


def test_another_model_is_noticed_before_it_is_downloaded(broker: MemoryBroker) -> None:
    class Wider(Points):
        def model(self) -> nn.Module:
            return nn.Linear(4, 200)

    aggregator = Aggregator(broker, Wider(), chunk_bytes=TINY)
    worker = Worker(broker)
    with running(worker, Points(), chunk_bytes=TINY) as summary:
        aggregator.broadcast(0)
        with pytest.raises(Exception, match="differs from the run's model"):
            summary.result(LIMIT)

    assert worker.fetched == []


def test_a_trainer_leaves_with_the_last_version_and_does_not_download_it(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    worker = Worker(broker)
    with running(worker, Points(), chunk_bytes=TINY) as summary:
        aggregator.broadcast(9, done=True)
        assert (summary.result(LIMIT).reason, summary.result(LIMIT).version) == ("done", 9)

    assert worker.fetched == []
    assert aggregator.of(Goodbye)[0].reason == "done"


def test_an_evaluator_downloads_the_last_version_first(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    worker = Worker(broker)
    with running(worker, Points(), None, run_evaluator, chunk_bytes=TINY) as summary:
        aggregator.broadcast(9, done=True)
        assert summary.result(LIMIT).reason == "done"

    assert worker.versions() == [9]
    assert [e.data["version"] for e in aggregator.of(Event, kind=EventKind.EVALUATION)] == [9]


def test_a_worker_slower_than_the_versions_gets_one_now_and_then(broker: MemoryBroker) -> None:
    """While one is on its way two newer ones are offered; it is finished and trained from, and then the newest."""
    aggregator = Aggregator(broker, Points(), chunk_bytes=TINY)
    worker = Worker(broker)
    slow: dict[int, tuple[bytes, ...]] = {}
    versions = iter(range(1, 100))

    def overtaken(delivery: Delivery) -> bool:
        chunks = broker.run(RUN).newest.chunks  # type: ignore[union-attr]
        slow[int(delivery.headers["version"])] = tuple(chunks)
        for _ in range(2):
            aggregator.tensors = {name: array + 1 for name, array in aggregator.tensors.items()}
            aggregator.broadcast(next(versions))
        assert worker.sink is not None
        worker.sink(Delivery(**fields_of(delivery), chunks=tuple(chunks)))
        return True

    worker.lose = overtaken
    with running(worker, Points(), chunk_bytes=TINY):
        aggregator.broadcast(0)
        aggregator.wait_for(lambda: len(aggregator.of(Update)) >= 4)

    bases = [u.base_version for u in aggregator.of(Update)]
    assert bases == sorted(set(bases))
    assert set(bases) <= set(slow)
