"""Which versions a worker evaluates, on which examples, and what the machine does about it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from broker.errors import TaskError
from broker.messages import ParametersHead, Work
from tests.unit.worker_client.models import Points, config, head_of, version_of
from worker_client.core import State, WorkerMachine
from worker_client.core import events as ev
from worker_client.core.checks import Checks
from worker_client.splitting import split
from worker_client.training import Trainer, initial_parameters

EVERY: dict[str, Any] = {"work": Work(evaluate_every=3)}


def head(version: int, **plan: Any) -> ParametersHead:
    return head_of(version, **EVERY, **plan)


def machine(*events: ev.Event) -> WorkerMachine:
    result = WorkerMachine("w0", "i0", can_check=True)
    for event in events:
        result.handle(event)
    return result


# --------------------------------------------------------------------------------------------- which versions


def test_one_version_in_each_stretch_is_due_and_the_last() -> None:
    checks = Checks(can=True)
    due = []
    for version, done in ((1, False), (2, False), (4, False), (5, False), (10, False), (11, True)):
        if checks.is_due(head(version, done=done)):
            checks.begin(head(version))
            due.append(version)
    assert due == [1, 4, 10, 11]
    assert not checks.is_due(head(11, done=True))


def test_nothing_is_due_where_nobody_asks_or_nothing_is_held_out() -> None:
    assert not Checks(can=True).is_due(head_of(0))
    assert not Checks(can=False).is_due(head(0))


# ---------------------------------------------------------------------------------------------- the machine


def test_it_evaluates_a_version_and_then_trains_from_it() -> None:
    worker = machine()
    assert worker.handle(ev.ParametersArrived(head(0))) == [ev.Evaluate(head(0))]
    assert worker.state is State.EVALUATING
    assert worker.handle(ev.EvaluationDone()) == [ev.Train(head(0), 0)]
    assert worker.handle(ev.TrainingDone()) == [ev.Publish()]
    worker.handle(ev.PublishConfirmed())
    assert worker.handle(ev.ParametersArrived(head(1))) == [ev.Train(head(1), 0)]


def test_a_version_that_comes_meanwhile_is_trained_from_afterwards() -> None:
    worker = machine(ev.ParametersArrived(head(0)))
    assert worker.handle(ev.ParametersArrived(head(1))) == []
    assert worker.handle(ev.EvaluationDone()) == [ev.Train(head(1), 0)]


def test_the_last_version_is_evaluated_before_it_leaves() -> None:
    worker = machine(ev.ParametersArrived(head(0)), ev.EvaluationDone(), ev.TrainingDone(), ev.PublishConfirmed())
    assert worker.handle(ev.ParametersArrived(head(1, done=True))) == [ev.Evaluate(head(1, done=True))]
    assert worker.handle(ev.ParametersArrived(head(1, done=True, attempt=1))) == []
    assert worker.handle(ev.EvaluationDone()) == [ev.SayGoodbye("done"), ev.Exit("done")]


def test_a_training_in_hand_is_abandoned_for_the_last_version() -> None:
    worker = machine(ev.ParametersArrived(head(0)), ev.EvaluationDone())
    assert worker.handle(ev.ParametersArrived(head(1, done=True))) == [ev.Abandon()]
    assert worker.handle(ev.Abandoned()) == [ev.Evaluate(head(1, done=True))]


def test_a_last_version_in_chunks_is_downloaded_first() -> None:
    worker = machine(ev.ParametersArrived(head(0)), ev.EvaluationDone(), ev.TrainingDone(), ev.PublishConfirmed())
    last = head(1, done=True)
    assert worker.handle(ev.Offered(last)) == [ev.Download(last)]
    assert worker.handle(ev.ParametersArrived(last)) == [ev.Evaluate(last)]


def test_it_leaves_without_if_that_download_fails() -> None:
    worker = machine(ev.ParametersArrived(head(0)), ev.EvaluationDone(), ev.TrainingDone(), ev.PublishConfirmed())
    last = head(1, done=True)
    worker.handle(ev.Offered(last))
    assert worker.handle(ev.DownloadFailed(last)) == [ev.SayGoodbye("done"), ev.Exit("done")]


@pytest.mark.parametrize("is_last", [False, True])
def test_a_stop_ends_an_evaluation(is_last: bool) -> None:
    worker = machine(ev.ParametersArrived(head(0, done=is_last)))
    assert worker.state is State.EVALUATING
    assert worker.handle(ev.StopRequested()) == [ev.Abandon()]
    reason = "done" if is_last else "stopped"
    assert worker.handle(ev.Abandoned()) == [ev.SayGoodbye(reason), ev.Exit(reason)]


def test_an_update_on_its_way_is_confirmed_beside_an_evaluation() -> None:
    worker = machine(ev.ParametersArrived(head(2)), ev.EvaluationDone(), ev.TrainingDone())
    assert worker.handle(ev.ParametersArrived(head(3))) == [ev.Evaluate(head(3))]
    assert worker.handle(ev.PublishConfirmed()) == []
    assert worker.handle(ev.EvaluationDone()) == [ev.Train(head(3), 0)]


def test_without_data_held_out_nothing_changes() -> None:
    worker = WorkerMachine("w0", "i0")
    assert worker.handle(ev.ParametersArrived(head(0))) == [ev.Train(head(0), 0)]


# ------------------------------------------------------------------------------------------------- the data


class Plain:
    """A data set that is a sequence and nothing else."""

    def __len__(self) -> int:
        return 10

    def __getitem__(self, index: int) -> int:
        return index * index


def test_a_share_is_held_out_and_always_the_same() -> None:
    train, held = split(Plain(), 0.25, "7")
    parts = [[part[i] for i in range(len(part))] for part in (train, held)]
    assert (len(parts[0]), len(parts[1])) == (8, 2)
    assert sorted(parts[0] + parts[1]) == [i * i for i in range(10)]
    again = split(Plain(), 0.25, "7")[1]
    assert [again[i] for i in range(2)] == parts[1]
    others = [tuple(part[i] for i in range(2)) for part in (split(Plain(), 0.25, str(key))[1] for key in range(8))]
    assert len(set(others)) > 3


def test_tensors_stay_tensors() -> None:
    data = TensorDataset(torch.arange(10.0), torch.arange(10))
    train, held = split(data, 0.3, "x")
    assert isinstance(train, TensorDataset)
    assert isinstance(held, TensorDataset)
    assert (len(train), len(held)) == (7, 3)
    assert torch.equal(train.tensors[0].long(), train.tensors[1])


def test_neither_part_is_ever_empty() -> None:
    for fraction, sizes in ((0.001, (9, 1)), (0.999, (1, 9))):
        assert tuple(map(len, split(Plain(), fraction, "k"))) == sizes
    with pytest.raises(TaskError, match="validation_fraction"):
        split(TensorDataset(torch.zeros(1)), 0.5, "k")


def test_the_trainer_trains_on_the_rest_and_evaluates_on_what_is_held_out() -> None:
    task = Points(examples=50)
    model, tensors = initial_parameters(task)
    trainer = Trainer(task, config(validation_fraction=0.2, local_epochs=30, learning_rate=0.3))
    assert trainer.load_data() == 40
    assert trainer.held_out == 10

    before = trainer.check(version_of(model, tensors, work=Work(evaluate_every=1)))
    trained = trainer.train(version_of(model, tensors))
    after = trainer.check(version_of(model, {n: a + trained.tensors[n] for n, a in tensors.items()}))

    assert (trained.examples, before.examples, after.examples) == (40, 10, 10)
    assert after.metrics["loss"] < before.metrics["loss"]
    assert set(before.metrics) == {"loss", "accuracy"}


def test_personal_figures_are_those_after_local_steps_and_change_nothing_else() -> None:
    task = Points(examples=50)
    model, tensors = initial_parameters(task)
    settings: dict[str, Any] = {"validation_fraction": 0.2, "learning_rate": 0.5}
    work = Work(evaluate_every=1, personalise_steps=40)
    trainer = Trainer(task, config(**settings))

    checked = trainer.check(version_of(model, tensors, work=work))
    trained = trainer.train(version_of(model, tensors))

    assert checked.metrics["personal/loss"] < checked.metrics["loss"]
    plain = Trainer(task, config(**settings)).train(version_of(model, tensors))
    assert all(np.array_equal(plain.tensors[name], array) for name, array in trained.tensors.items())


def test_without_a_fraction_nothing_is_held_out() -> None:
    trainer = Trainer(Points(), config())
    assert trainer.load_data() == 50
    assert trainer.held_out == 0
