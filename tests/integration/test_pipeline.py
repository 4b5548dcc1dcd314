"""The pipeline over both transports: workers that train with torch, the aggregator, and the arithmetic between."""

from __future__ import annotations

import contextlib
import itertools
import secrets
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core.ledger import Ledger
from aggregator.history import read_history
from aggregator.service import AggregatorService, Outcome
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.errors import StaleEpoch
from broker.memory import MemoryBroker
from broker.messages import Mode, Parameters, Plan, Reason, Update, UpdateId, parameters_digest
from broker.topology import Topology
from broker.transport import AggregatorTransport, Outgoing, Source, WorkerTransport
from broker.wire import decode, encode
from tests.support.node import config_of, drain
from tests.support.waiting import Inbox, wait_for
from worker_client.client import Summary, run_worker
from worker_client.config import WorkerConfig
from worker_client.task import Shard, Task
from worker_client.training import Trainer, initial_parameters


class Place(Protocol):
    """A broker with one run on it."""

    run: str

    def aggregator(self, model_bytes: int, prefetch: int) -> AggregatorTransport: ...

    def worker(self, name: str) -> WorkerTransport: ...

    def dead(self) -> list[tuple[str, str]]:
        """Reason and message id of each dead letter."""


class Memory:
    def __init__(self) -> None:
        self.run = "run"
        self.broker = MemoryBroker()

    def aggregator(self, model_bytes: int, prefetch: int) -> AggregatorTransport:
        return self.broker.aggregator(self.run, prefetch=prefetch)

    def worker(self, name: str) -> WorkerTransport:
        return self.broker.worker(self.run, name)

    def dead(self) -> list[tuple[str, str]]:
        letters = self.broker.dead_letters(self.run)
        return [(letter.reason.value, str(letter.delivery.headers["message_id"])) for letter in letters]


class RabbitMQ:
    def __init__(self, node: PrivateNode) -> None:
        self.run = f"run-{secrets.token_hex(4)}"
        self.node = node
        self.topology = Topology(self.run)

    def aggregator(self, model_bytes: int, prefetch: int) -> AggregatorTransport:
        config = config_of(self.node)
        return AmqpAggregatorTransport(config, self.topology, model_bytes=model_bytes, prefetch=prefetch)

    def worker(self, name: str) -> WorkerTransport:
        return AmqpWorkerTransport(config_of(self.node), self.topology, worker=name)

    def dead(self) -> list[tuple[str, str]]:
        letters = drain(self.node, self.topology.dead)
        return [(str((properties.headers or {})["reason"]), str(properties.message_id)) for properties, _ in letters]


@pytest.fixture(params=["memory", pytest.param("rabbitmq", marks=pytest.mark.broker)])
def place(request: pytest.FixtureRequest) -> Place:
    return Memory() if request.param == "memory" else RabbitMQ(request.getfixturevalue("node"))


class Federation:
    """An aggregator and workers as threads, over whatever transport."""

    def __init__(self, place: Place, folder: Path, task: Task, config: AggregatorConfig) -> None:
        self.place, self.folder, self.task, self.config = place, folder, task, config
        self.store = CheckpointStore(folder / "checkpoints", place.run)
        if not self.store.files():
            model, parameters = initial_parameters(task)
            self.store.create(model, parameters, now=0.0)
        self.outcome: Outcome | None = None
        self.summaries: dict[str, Summary] = {}
        self.errors: list[BaseException] = []
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []

    def _start(self, target: Any, *arguments: Any) -> threading.Thread:
        def run() -> None:
            try:
                target(*arguments)
            except BaseException as error:  # noqa: BLE001 (handed to the test)
                self.errors.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def start_aggregator(self) -> AggregatorService:
        store = CheckpointStore(self.store.folder, self.place.run)
        size = store.load().model.nbytes
        service = AggregatorService(folder=self.folder, run=self.place.run, config=self.config, store=store)

        def work() -> None:
            self.outcome = service.run(self.place.aggregator(size, self.config.prefetch(size)))

        self.aggregator_thread = self._start(work)
        return service

    def start_worker(self, name: str, shard: str, **settings: Any) -> None:
        config = WorkerConfig(name=name, shard=shard, device="cpu", heartbeat_seconds=0.2, **settings)

        def work() -> None:
            transport = self.place.worker(name)
            self.summaries[name] = run_worker(config, self.place.run, transport, self.task, stop=self._stop)

        self._start(work)

    def join(self, seconds: float = 60.0) -> None:
        for thread in self._threads:
            thread.join(seconds)
            assert not thread.is_alive(), f"still running; errors so far: {self.errors}"
        assert self.errors == []

    def stop(self) -> None:
        self._stop.set()

    @property
    def parameters(self) -> dict[str, Any]:
        return dict(self.store.load().parameters)


@contextlib.contextmanager
def federation(place: Place, folder: Path, task: Task, **settings: Any) -> Iterator[Federation]:
    running = Federation(place, folder, task, AggregatorConfig(linger=5.0, **settings))
    try:
        yield running
    finally:
        running.stop()


# ------------------------------------------------------------------------------ equal to centralised descent

SIZES = (7, 19, 40, 3, 31)


class Regression(Task):
    """A small network with unequal shards; smooth, so that float32 errors stay small."""

    seed = 11

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))

    def pooled(self) -> tuple[torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(5)
        inputs = torch.randn(sum(SIZES), 5, generator=random)
        return inputs, torch.randint(0, 3, (sum(SIZES),), generator=random)

    def data(self, shard: Shard) -> TensorDataset:
        start = sum(SIZES[: shard.index])
        inputs, labels = self.pooled()
        return TensorDataset(inputs[start : start + SIZES[shard.index]], labels[start : start + SIZES[shard.index]])


def centralised(task: Regression, rounds: int, rate: float) -> dict[str, Any]:
    """Full-batch gradient descent on the pooled data with torch's own optimiser."""
    _, start = initial_parameters(task)
    model = task.model()
    model.load_state_dict({name: torch.from_numpy(array.copy()) for name, array in start.items()})
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    for _ in range(rounds):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(task.pooled()[0]), task.pooled()[1]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    return {name: value.detach().numpy() for name, value in model.state_dict().items()}


def test_gradient_mode_equals_centralised_descent_on_the_pooled_data(place: Place, tmp_path: Path) -> None:
    """5 workers of unequal shards, 20 rounds, full batches (in pieces of 8): within 1e-5."""
    task = Regression()
    with federation(
        place,
        tmp_path,
        task,
        mode=Mode.GRADIENT,
        rounds="synchronous",
        minimum_updates=len(SIZES),
        learning_rate=0.5,
        stop_after_rounds=20,
    ) as running:
        running.start_aggregator()
        for index in range(len(SIZES)):
            running.start_worker(f"w{index}", f"{index}/{len(SIZES)}", batch_size=8)
        running.join()

    expected = centralised(task, 20, 0.5)
    actual = running.parameters
    for name, values in expected.items():
        np.testing.assert_allclose(actual[name], values, atol=1e-5)
    moved = max(np.abs(values - initial_parameters(task)[1][name]).max() for name, values in expected.items())
    assert moved > 0.1, "the test would not notice if nothing had been trained"
    assert running.outcome is not None
    assert (running.outcome.applied, running.outcome.confirmed, running.outcome.rejected) == (100, 100, {})


@pytest.mark.parametrize("mode", [Mode.DELTA, Mode.PARAMETERS])
def test_synchronous_fedavg_equals_a_plain_reference(place: Place, tmp_path: Path, mode: Mode) -> None:
    """Local SGD by the same trainer, averaged beside it with numpy in double precision."""
    task, rounds = Regression(), 3
    settings: dict[str, Any] = {"rounds": "synchronous", "minimum_updates": len(SIZES), "learning_rate": 1.0}
    with federation(place, tmp_path, task, mode=mode, stop_after_rounds=rounds, **settings) as running:
        running.start_aggregator()
        for index in range(len(SIZES)):
            running.start_worker(f"w{index}", f"{index}/{len(SIZES)}", batch_size=4, local_epochs=2)
        running.join()

    model, values = initial_parameters(task)
    trainers = [
        Trainer(task, WorkerConfig(name=f"w{i}", shard=f"{i}/{len(SIZES)}", device="cpu", batch_size=4, local_epochs=2))
        for i in range(len(SIZES))
    ]
    for version in range(rounds):
        base = Parameters(
            run="r",
            epoch=1,
            version=version,
            plan=Plan(),
            digest=parameters_digest(values),
            model=model,
            tensors=values,
        )
        deltas = [trainer.train(base).tensors for trainer in trainers]
        values = {
            name: (array + np.average([d[name].astype(np.float64) for d in deltas], axis=0, weights=SIZES)).astype("f4")
            for name, array in values.items()
        }
    for name, array in values.items():
        np.testing.assert_allclose(running.parameters[name], array, atol=2e-6)


# ------------------------------------------------------------------------------------------ what is rejected


def good_update(place: Place, **changes: Any) -> Update:
    model, values = initial_parameters(Regression())
    update = Update(
        run=place.run,
        id=UpdateId("bad", "i", changes.pop("seq", 0)),
        base_version=0,
        base_epoch=0,
        mode=Mode.DELTA,
        examples=1,
        model=model,
        tensors={name: np.zeros_like(array) for name, array in values.items()},
    )
    return replace(update, **changes)


def poison(place: Place) -> dict[Reason, bytes]:
    """One message for each reason."""
    good = good_update(place)
    first = next(iter(good.tensors))
    bad_tensors = {**good.tensors, first: np.full_like(good.tensors[first], np.nan)}
    smaller = Regression()
    smaller.model = lambda: nn.Linear(2, 2)  # type: ignore[method-assign]
    other, others = initial_parameters(smaller)
    return {
        Reason.MALFORMED: encode(good)[:-3],
        Reason.UNKNOWN_FORMAT: encode(good)[:4] + b"\x09" + encode(good)[5:],
        Reason.WRONG_RUN: encode(replace(good, run="somebody-elses")),
        Reason.WRONG_MODE: encode(replace(good, mode=Mode.GRADIENT)),
        Reason.MODEL_MISMATCH: encode(replace(good, model=other, tensors=others)),
        Reason.NO_EXAMPLES: encode(replace(good, examples=0)),
        Reason.NOT_FINITE: encode(replace(good, tensors=bad_tensors)),
        Reason.FUTURE_VERSION: encode(replace(good, base_version=10**6)),
    }


def test_poison_goes_to_the_dead_letters_with_its_reason_the_worker_is_told_and_the_run_goes_on(
    place: Place, tmp_path: Path
) -> None:
    task = Regression()
    with federation(place, tmp_path, task, buffer_size=2, stop_after_rounds=2, worker_timeout=2.0) as running:
        running.start_aggregator()
        inbox = Inbox()
        hostile = place.worker("bad")
        hostile.open(inbox, wait=20.0)
        inbox.wait_delivery(1, source=Source.PARAMETERS)
        messages = poison(place)
        for reason, body in messages.items():
            headers: dict[str, str | int] = {"worker": "bad"}
            hostile.publish(Outgoing(body=body, message_id=f"bad/{reason}", headers=headers)).result(20)
        notices = wait_for(
            lambda: len(inbox.deliveries(Source.EVENT)) >= len(messages) and inbox.deliveries(Source.EVENT),
            what="notices",
        )
        told = {decode(notice.body).data["reason"] for notice in notices}  # type: ignore[union-attr]
        hostile.close()
        running.start_worker("good", "0/5", batch_size=4)
        running.join()

    assert told == {reason.value for reason in messages}
    expected = {(reason.value, f"bad/{reason}") for reason in messages}
    assert expected <= set(place.dead())
    assert running.outcome is not None
    assert running.outcome.version == 2
    for reason in messages:
        assert running.outcome.rejected[reason.value] == 1


def test_one_update_published_five_times_changes_the_model_once(place: Place, tmp_path: Path) -> None:
    task = Regression()
    with federation(place, tmp_path, task, buffer_size=1, staleness="constant") as running:
        service = running.start_aggregator()
        inbox = Inbox()
        worker = place.worker("bad")
        worker.open(inbox, wait=20.0)
        inbox.wait_delivery(1, source=Source.PARAMETERS)
        first = good_update(place)
        ones = {name: np.ones_like(array) for name, array in first.tensors.items()}
        for seq in (0, 0, 0, 1, 0, 0):
            body = encode(good_update(place, seq=seq, tensors=ones))
            worker.publish(Outgoing(body=body, headers={"worker": "bad"})).result(20)
        wait_for(lambda: running.store.load().version == 2, what="version 2")
        service.stop()
        running.aggregator_thread.join(30)
        worker.close()

    _, start = initial_parameters(task)
    assert len(Ledger(running.store.load().ledger)) == 2
    for name, array in start.items():
        assert running.parameters[name].tobytes() == ((array + np.float32(1)) + np.float32(1)).tobytes()


def test_the_history_tells_every_version_and_its_updates(place: Place, tmp_path: Path) -> None:
    with federation(place, tmp_path, Regression(), buffer_size=3, stop_after_rounds=4) as running:
        running.start_aggregator()
        running.start_worker("a", "2/5")
        running.start_worker("b", "4/5")
        running.join()

    versions = [line for line in read_history(tmp_path / "history.jsonl") if line["kind"] == "version"]
    assert [line["version"] for line in versions] == [1, 2, 3, 4]
    ids = [(u["worker"], u["incarnation"], u["seq"]) for line in versions for u in line["updates"]]
    assert len(ids) == len(set(ids)) == 12
    assert {(i.worker, i.incarnation, i.seq) for i in Ledger(running.store.load().ledger)} == set(ids)
    for before, after in itertools.pairwise(versions):
        assert after["before"] == before["after"]
    for line in versions:
        for update in line["updates"]:
            assert update["staleness"] == line["version"] - 1 - update["base_version"]
            assert update["weight"] == pytest.approx((1 + update["staleness"]) ** -0.5)


def test_a_second_aggregator_stands_by_and_takes_over_when_the_first_leaves(place: Place, tmp_path: Path) -> None:
    running = Federation(place, tmp_path, Regression(), AggregatorConfig(linger=5.0, buffer_size=2))
    first = running.start_aggregator()
    thread = running.aggregator_thread
    wait_for(lambda: first.leads, what="the first leads")
    running.config = AggregatorConfig(linger=5.0, buffer_size=2, stop_after_rounds=4)
    second = running.start_aggregator()
    running.start_worker("a", "2/5", batch_size=8)
    wait_for(lambda: running.store.load().version >= 2, 30, what="two versions")
    assert first.leads
    assert not second.leads

    first.stop()
    thread.join(30)
    running.aggregator_thread.join(60)
    running.stop()
    running.join()

    assert not thread.is_alive()
    assert running.outcome is not None
    assert (running.outcome.reason, running.outcome.epoch) == ("done", 2)
    assert running.outcome.version >= 4
    assert {reason for reason, _ in place.dead()} <= {"run-done"}


def test_an_aggregator_whose_state_has_a_newer_owner_leaves_though_it_has_nothing_to_do(
    place: Place, tmp_path: Path
) -> None:
    """It is idle, so no commit of its own tells it; what it holds is given to the next one."""
    running = Federation(place, tmp_path, Regression(), AggregatorConfig(linger=5.0, buffer_size=2))
    service = running.start_aggregator()
    wait_for(lambda: service.leads, what="it leads")

    CheckpointStore(running.store.folder, place.run).claim()
    running.aggregator_thread.join(30)

    assert [type(error) for error in running.errors] == [StaleEpoch]
    running.errors.clear()
    running.config = AggregatorConfig(linger=5.0, buffer_size=2, stop_after_rounds=2)
    running.start_aggregator()
    running.start_worker("a", "2/5", batch_size=8)
    running.join()
    assert running.outcome is not None
    assert (running.outcome.version, running.outcome.epoch) == (2, 3)


def test_a_finished_run_that_is_started_again_keeps_its_summary(place: Place, tmp_path: Path) -> None:
    with federation(place, tmp_path, Regression(), buffer_size=2, stop_after_rounds=2) as running:
        running.start_aggregator()
        running.start_worker("a", "2/5", batch_size=8)
        running.join()
        before = (tmp_path / "summary.json").read_bytes()

        running.start_aggregator()
        running.join()

    assert (tmp_path / "summary.json").read_bytes() == before
    assert running.outcome is not None
    assert (running.outcome.reason, running.outcome.version) == ("done", 2)
