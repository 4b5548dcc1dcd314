from __future__ import annotations

import logging
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from broker.errors import AccessRefused, BrokerError, ConnectionLost, MessageTooLarge, ModelMismatch, TaskError
from broker.memory import MemoryBroker, MemoryWorkerTransport
from broker.messages import (
    Event,
    EventKind,
    Goodbye,
    Hello,
    Mode,
    Parameters,
    Reason,
    Role,
    Rounds,
    Update,
    parameters_digest,
)
from broker.transport import Believe, Delivery, Failed, Outgoing, Sink, Source
from broker.wire import encode
from tests.support.waiting import wait_for
from tests.unit.worker_client.ends import LIMIT, Aggregator, running
from tests.unit.worker_client.models import RUN, Points, config, version_of
from worker_client.client import Summary, run_evaluator, run_worker
from worker_client.core.rejections import MOST_NOT_FINITE
from worker_client.task import Examples, Shard, TrainingContext, TrainingResult


@pytest.fixture
def broker() -> MemoryBroker:
    return MemoryBroker()


def test_a_worker_trains_each_version_and_leaves_with_the_last(broker: MemoryBroker, tmp_path: Path) -> None:
    aggregator = Aggregator(broker, Points())
    with running(broker, Points(), folder=tmp_path) as worker:
        # When two versions come, and then the end
        for version in (0, 1):
            aggregator.broadcast(version, epoch=3)
            aggregator.wait_for(lambda: len(aggregator.of(Update)) == version + 1)  # noqa: B023
        aggregator.broadcast(2, epoch=3, done=True)
        summary = worker.result(LIMIT)

    # Then
    assert (summary.reason, summary.confirmed, summary.version) == ("done", 2, 2)
    updates = aggregator.of(Update)
    assert [(u.id.seq, u.base_version, u.base_epoch, u.mode) for u in updates] == [
        (0, 0, 3, Mode.DELTA),
        (1, 1, 3, Mode.DELTA),
    ]
    assert len({(u.id.worker, u.id.incarnation) for u in updates}) == 1
    assert updates[0].examples == 50
    assert updates[0].model == aggregator.model
    assert updates[0].metrics["loss"] > 0
    assert any(np.abs(array).sum() > 0 for array in updates[0].tensors.values())
    hello, goodbye = aggregator.of(Hello)[0], aggregator.of(Goodbye)[0]
    assert (hello.worker, hello.role, hello.version) == ("w0", Role.TRAINER, -1)
    assert (goodbye.confirmed, goodbye.reason, goodbye.incarnation) == (2, "done", updates[0].id.incarnation)


def test_headers_repeat_the_small_facts_for_the_admin_ui(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())
    with running(broker, Points()):
        aggregator.broadcast(4)
        update = aggregator.wait_for(lambda: aggregator.of(Update))[0]

    delivery = next(d for d in aggregator.outgoing if d.source is Source.UPDATE)
    assert delivery.headers == {
        "run": RUN,
        "worker": "w0",
        "incarnation": update.id.incarnation,
        "seq": 0,
        "base_version": 4,
        "examples": 50,
        "steps": 2,
        "message_id": str(update.id),
    }


def test_a_gradient_is_published_where_the_run_wants_one(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())
    with running(broker, Points()):
        aggregator.broadcast(0, mode=Mode.GRADIENT, rounds=Rounds.SYNCHRONOUS)
        [update] = aggregator.wait_for(lambda: aggregator.of(Update))

    assert update.mode is Mode.GRADIENT


def test_a_restarted_worker_is_a_new_incarnation_and_tells_of_the_former_one(
    broker: MemoryBroker, tmp_path: Path
) -> None:
    aggregator = Aggregator(broker, Points())
    aggregator.broadcast(0)

    for _ in range(2):
        with running(broker, Points(), folder=tmp_path, max_updates=1) as worker:
            assert worker.result(LIMIT).reason == "limit"

    first, second = (hello.incarnation for hello in aggregator.of(Hello))
    assert first != second
    assert [str(update.id) for update in aggregator.of(Update)] == [f"w0/{first}/0", f"w0/{second}/0"]
    # Each life says what it had confirmed; the second also says it of the first, which might not have come to it.
    told = [(g.incarnation, g.confirmed) for g in aggregator.of(Goodbye)]
    assert told == [(first, 1), (first, 1), (second, 1)]


def test_heartbeats_tell_what_the_worker_does(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())

    def beats() -> list[Event]:
        return aggregator.of(Event, kind=EventKind.HEARTBEAT)

    with running(broker, Points(), delay=60.0):
        aggregator.wait_for(lambda: any(b.data["state"] == "waiting" for b in beats()))
        aggregator.broadcast(7)
        aggregator.wait_for(lambda: any(b.data["state"] == "training" for b in beats()))

    data = next(b.data for b in beats() if b.data["state"] == "training")
    assert (data["version"], data["confirmed"], data["role"], data["loss"]) == (7, 0, "trainer", None)
    assert abs(beats()[0].time - time.time()) < 60


def test_a_worker_that_was_there_before_its_run_says_hello_once_the_run_exists(broker: MemoryBroker) -> None:
    with running(broker, Points()):
        # The transport's first answer is that nobody has declared the run.
        aggregator = Aggregator(broker, Points())
        [hello] = aggregator.wait_for(lambda: aggregator.of(Hello))

    assert hello.version == -1


def test_a_broken_connection_is_greeted_again_with_the_newest_version(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())
    transport = broker.worker(RUN, "w0")
    with running(transport, Points()):
        aggregator.broadcast(3)
        aggregator.wait_for(lambda: aggregator.of(Update))
        transport.drop()
        aggregator.wait_for(lambda: aggregator.of(Hello, version=3))


# ---------------------------------------------------------------------------------------------- stopping


def test_a_stop_in_mid_training_is_answered_at_the_next_batch(broker: MemoryBroker, tmp_path: Path) -> None:
    # Given a training of endless batches
    started, stop = threading.Event(), threading.Event()

    class Endless(Points):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            started.set()
            return super().loss(model, batch)

    aggregator = Aggregator(broker, Points())
    with running(broker, Endless(), stop, local_steps=10_000_000, folder=tmp_path) as worker:
        aggregator.broadcast(0)
        assert started.wait(LIMIT)

        # When
        stop.set()

        # Then
        assert worker.result(LIMIT).reason == "stopped"
    assert not aggregator.of(Update)
    assert aggregator.of(Goodbye)[0].reason == "stopped"


def test_a_training_that_never_looks_cannot_keep_the_worker(broker: MemoryBroker) -> None:
    started, released, stop = threading.Event(), threading.Event(), threading.Event()

    class Deaf(Points):
        def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
            started.set()
            released.wait(LIMIT)
            return TrainingResult(examples=1)

    def live(*args: Any, **rest: Any) -> Summary:
        return run_worker(*args, **rest, grace=0.1)

    aggregator = Aggregator(broker, Points())
    with running(broker, Deaf(), stop, live) as worker:
        aggregator.broadcast(0)
        assert started.wait(LIMIT)
        stop.set()
        assert worker.result(LIMIT).reason == "stopped"
    released.set()


def test_a_stop_is_answered_while_the_broker_is_not_there(tmp_path: Path) -> None:
    opening, stop = threading.Event(), threading.Event()

    class Nowhere(MemoryWorkerTransport):
        def open(self, sink: Sink, *, wait: float = 0.0, believe: Believe | None = None) -> None:
            opening.set()
            stop.wait(LIMIT)

    transport = Nowhere(MemoryBroker(), MemoryBroker().worker(RUN, "w0")._topology, "w0")
    with running(transport, Points(), stop) as worker:
        assert opening.wait(LIMIT)
        stop.set()
        assert worker.result(LIMIT) == Summary(reason="stopped", confirmed=0, version=-1, metrics={})


# --------------------------------------------------------------------------------------------- publishing


class Faulty(MemoryWorkerTransport):
    """A transport whose publishes fail as ``errors`` say, then work."""

    def __init__(self, broker: MemoryBroker, errors: list[BrokerError]) -> None:
        super().__init__(broker, broker.worker(RUN, "w0")._topology, "w0")
        self.errors = errors
        self.tried: list[Outgoing] = []

    def publish(self, message: Outgoing) -> Future[None]:
        self.tried.append(message)
        if not self.errors:
            return super().publish(message)
        failed: Future[None] = Future()
        failed.set_exception(self.errors.pop(0))
        return failed


def test_an_update_whose_fate_is_unknown_is_published_again_under_the_same_id(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())
    transport = Faulty(broker, [ConnectionLost("cut")])
    with running(transport, Points(), max_updates=1) as worker:
        aggregator.broadcast(0)
        assert worker.result(LIMIT).confirmed == 1

    assert len(transport.tried) == 2
    assert transport.tried[0] == transport.tried[1]
    assert [u.id.seq for u in aggregator.of(Update)] == [0]


def test_an_update_that_will_never_fit_ends_the_worker(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())
    with running(Faulty(broker, [MessageTooLarge("200 MiB")]), Points()) as worker:
        aggregator.broadcast(0)
        with pytest.raises(MessageTooLarge, match="200 MiB"):
            worker.result(LIMIT)

    assert "200 MiB" in aggregator.of(Goodbye)[0].reason


def test_a_broker_that_refuses_for_good_ends_the_worker() -> None:
    class Refusing(MemoryWorkerTransport):
        def open(self, sink: Sink, *, wait: float = 0.0, believe: Believe | None = None) -> None:
            raise AccessRefused("user 'w0' may not read")

    broker = MemoryBroker()
    with (
        running(Refusing(broker, broker.worker(RUN, "w0")._topology, "w0"), Points()) as worker,
        pytest.raises(AccessRefused, match="may not read"),
    ):
        worker.result(LIMIT)


def test_a_broker_that_refuses_later_ends_the_worker_too(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())
    transport = broker.worker(RUN, "w0")
    with running(transport, Points()) as worker:
        aggregator.wait_for(lambda: aggregator.of(Hello))
        assert transport.sink is not None
        transport.sink(Failed(AccessRefused("password changed")))
        with pytest.raises(AccessRefused, match="password changed"):
            worker.result(LIMIT)


# ---------------------------------------------------------------------------------------------- mistakes


def test_another_model_ends_the_worker_and_shows_the_difference(broker: MemoryBroker) -> None:
    class Wider(Points):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 2))

    aggregator = Aggregator(broker, Points())
    with running(broker, Wider()) as worker:
        aggregator.broadcast(0)
        with pytest.raises(ModelMismatch) as caught:
            worker.result(LIMIT)

    assert "this worker's task Wider differs from the run's model" in str(caught.value)
    assert "0.weight: the run has float32[8, 4] parameter" in str(caught.value)
    assert aggregator.of(Goodbye)[0].reason.startswith("ModelMismatch")


def test_a_task_that_raises_ends_the_worker(broker: MemoryBroker) -> None:
    class Broken(Points):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            raise ZeroDivisionError("no classes")

    aggregator = Aggregator(broker, Points())
    with running(broker, Broken()) as worker:
        aggregator.broadcast(0)
        with pytest.raises(TaskError, match="no classes"):
            worker.result(LIMIT)


def test_an_empty_shard_ends_the_worker_before_it_connects(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())

    with pytest.raises(TaskError, match="shard 0/1 of worker 'w0'"):
        run_worker(config(), RUN, broker.worker(RUN, "w0"), Points(examples=0))

    assert not aggregator.messages


def test_bytes_that_are_no_message_and_other_runs_are_ignored(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator = Aggregator(broker, Points())
    transport = broker.worker(RUN, "w0")
    with caplog.at_level(logging.WARNING), running(transport, Points()):
        aggregator.wait_for(lambda: aggregator.of(Hello))
        foreign = Parameters(
            run="other",
            epoch=1,
            version=9,
            plan=version_of(aggregator.model, aggregator.tensors).plan,
            digest=parameters_digest(aggregator.tensors),
            model=aggregator.model,
            tensors=aggregator.tensors,
        )
        assert transport.sink is not None
        transport.sink(Delivery(source=Source.EVENT, body=b"nonsense"))
        transport.sink(Delivery(source=Source.PARAMETERS, body=encode(foreign), headers={"version": 1}))
        aggregator.broadcast(2)
        [update] = aggregator.wait_for(lambda: aggregator.of(Update))

    assert update.base_version == 2
    assert "is ignored" in caplog.text


def test_a_rejection_is_explained_in_the_log(broker: MemoryBroker, caplog: pytest.LogCaptureFixture) -> None:
    aggregator = Aggregator(broker, Points())
    with caplog.at_level(logging.WARNING), running(broker, Points()):
        aggregator.broadcast(0)
        [update] = aggregator.wait_for(lambda: aggregator.of(Update))
        aggregator.notify("w0", reason=str(Reason.TOO_STALE), detail="12 versions", update=str(update.id))
        aggregator.notify("w0", reason="a reason of the future", update=str(update.id))
        aggregator.broadcast(1)
        aggregator.wait_for(lambda: len(aggregator.of(Update)) == 2)

    assert f"update {update.id} was rejected: too-stale (12 versions): training took too long" in caplog.text
    assert "a reason of the future" in caplog.text


def test_a_pause_is_told_once_and_its_end(broker: MemoryBroker, caplog: pytest.LogCaptureFixture) -> None:
    aggregator = Aggregator(broker, Points())
    with caplog.at_level(logging.INFO), running(broker, Points()) as worker:
        aggregator.broadcast(0, paused=True)
        aggregator.broadcast(0, paused=True, attempt=1)
        wait_for(lambda: "the run is paused; waiting" in caplog.messages, LIMIT, what="the pause told")
        assert aggregator.of(Update) == []
        aggregator.broadcast(0, attempt=2)
        aggregator.wait_for(lambda: aggregator.of(Update))
        aggregator.broadcast(1, done=True)
        worker.result(LIMIT)

    told = [message for message in caplog.messages if message.startswith("the run")]
    assert told == ["the run is paused; waiting", "the run goes on"]


def test_a_rejection_that_would_meet_every_update_ends_the_worker(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())
    with running(broker, Points()) as worker:
        aggregator.broadcast(0)
        [update] = aggregator.wait_for(lambda: aggregator.of(Update))
        aggregator.notify("w0", reason=str(Reason.NOT_SUPPORTED), update=str(update.id))
        with pytest.raises(BrokerError, match="rejects what this worker publishes"):
            worker.result(LIMIT)


def test_an_update_that_diverged_is_published_with_a_warning(
    broker: MemoryBroker, caplog: pytest.LogCaptureFixture
) -> None:
    class Diverging(Points):
        def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
            tensors = {name: np.full(p.shape, np.nan, np.float32) for name, p in model.named_parameters()}
            return TrainingResult(examples=1, metrics={"loss": float("nan")}, tensors=tensors)

    aggregator = Aggregator(broker, Points())
    with caplog.at_level(logging.WARNING), running(broker, Diverging()) as worker:
        aggregator.broadcast(0)
        [update] = aggregator.wait_for(lambda: aggregator.of(Update))
        aggregator.wait_for(lambda: aggregator.of(Event) and aggregator.of(Event)[-1].data["confirmed"] == 1)
        last = aggregator.of(Event)[-1]
        for seq in range(MOST_NOT_FINITE):
            notice = f"w0/{update.id.incarnation}/{seq}"
            aggregator.notify("w0", reason=str(Reason.NOT_FINITE), update=notice)
        with pytest.raises(TaskError, match="training diverges: the last 10 updates"):
            worker.result(LIMIT)

    assert np.isnan(update.tensors["0.weight"]).all()
    assert last.data["loss"] is None
    assert "training diverged" in caplog.text


# --------------------------------------------------------------------------------------------- evaluators


def test_an_evaluator_tells_of_each_version_and_leaves_after_the_last(broker: MemoryBroker) -> None:
    aggregator = Aggregator(broker, Points())

    def tellings() -> list[Event]:
        return aggregator.of(Event, kind=EventKind.EVALUATION)

    with running(broker, Points(), None, run_evaluator, name="e0") as evaluator:
        aggregator.broadcast(0)
        aggregator.wait_for(lambda: len(tellings()) == 1)
        aggregator.broadcast(5, done=True)
        summary = evaluator.result(LIMIT)

    assert (summary.reason, summary.confirmed, summary.version) == ("done", 0, 5)
    assert [event.data["version"] for event in tellings()] == [0, 5]
    data = tellings()[0].data
    assert data["examples"] == 50
    assert data["loss"] == pytest.approx(summary.metrics["loss"])
    assert data["accuracy"] == pytest.approx(summary.metrics["accuracy"])
    assert [hello.role for hello in aggregator.of(Hello)] == [Role.EVALUATOR]
    assert not aggregator.of(Update)


def test_an_evaluator_stops_on_request(broker: MemoryBroker) -> None:
    stop = threading.Event()
    aggregator = Aggregator(broker, Points())
    with running(broker, Points(), stop, run_evaluator) as evaluator:
        aggregator.wait_for(lambda: aggregator.of(Hello))
        stop.set()
        assert evaluator.result(LIMIT).reason == "stopped"


def test_four_workers_learn_together(broker: MemoryBroker) -> None:
    # Given an aggregator that averages the deltas of four workers, each with other points
    task = Points(examples=40)
    aggregator = Aggregator(broker, task)
    with ThreadPoolExecutor(4) as pool:
        stop = threading.Event()
        workers = [
            pool.submit(
                run_worker,
                config(name=f"w{n}", shard=f"{n}/4", learning_rate=0.5, batch_size=8),
                RUN,
                broker.worker(RUN, f"w{n}"),
                task,
                stop=stop,
            )
            for n in range(4)
        ]
        for version in range(8):
            aggregator.broadcast(version)
            updates = aggregator.wait_for(
                lambda: (
                    len(found := aggregator.of(Update, base_version=version)) == 4 and found  # noqa: B023
                )
            )
            for name, array in aggregator.tensors.items():
                aggregator.tensors[name] = array + sum(u.tensors[name] for u in updates) / np.float32(4)
        aggregator.broadcast(8, done=True)
        assert {worker.result(LIMIT).reason for worker in workers} == {"done"}

    # Then points that nobody has seen are told apart
    model = task.model()
    model.load_state_dict({n: torch.from_numpy(a) for n, a in aggregator.tensors.items()})
    inputs, targets = task.data(Shard("unseen", 50, 100))[:]  # type: ignore[index]
    assert (model(inputs).argmax(1) == targets).float().mean() > 0.85
