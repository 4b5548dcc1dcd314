"""Parameters that stay with their worker."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from broker.errors import ConfigError, ModelMismatch, TaskError
from broker.memory import MemoryBroker
from broker.messages import Mode, Parameters, Work
from tests.unit.worker_client.models import RUN, Points, config, version_of
from worker_client.client import run_evaluator
from worker_client.config import WorkerConfig
from worker_client.context import Abandoned
from worker_client.modelstate import ModelState
from worker_client.own import FILE, OwnParameters
from worker_client.training import Trainer, initial_parameters, load_model

HEAD = {"local_parameters": ["2.*"]}


class Headed(Points):
    """A body with batch norm in it, and a head with a norm of its own."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 2)))


def base(task: Points, version: int = 0, **plan: Any) -> Parameters:
    model, tensors = initial_parameters(task, ("2.*",))
    return version_of(model, tensors, version, **plan)


def head_of(trainer: Trainer) -> dict[str, Any]:
    return trainer._own._values


def test_they_are_not_in_what_travels() -> None:
    trainer = Trainer(Headed(), config(**HEAD))
    assert [tensor.name for tensor in trainer.spec.tensors] == ["0.weight", "0.bias"]
    assert list(trainer.train(base(Headed())).tensors) == ["0.weight", "0.bias"]


def test_they_train_along_and_the_next_training_goes_on_with_them() -> None:
    trainer = Trainer(Headed(), config(**HEAD))
    start = {name: array.copy() for name, array in head_of(trainer).items()}
    assert set(start) >= {"2.0.weight", "2.0.running_mean", "2.0.num_batches_tracked", "2.1.weight"}

    trainer.train(base(Headed()))
    first = head_of(trainer)
    trainer.train(base(Headed(), 1))

    assert np.any(first["2.1.weight"] != start["2.1.weight"])
    assert np.any(head_of(trainer)["2.1.weight"] != first["2.1.weight"])
    assert [int(one["2.0.num_batches_tracked"]) for one in (start, first, head_of(trainer))] == [0, 2, 4]


def test_they_come_back_in_the_next_life(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**HEAD, "folder": tmp_path}
    one = Trainer(Headed(), config(**settings))
    one.train(base(Headed()))

    other = Trainer(Headed(), config(**settings))

    assert head_of(one).keys() == head_of(other).keys()
    assert all(np.array_equal(array, head_of(other)[name]) for name, array in head_of(one).items())
    again = [trainer.train(base(Headed(), 1)).tensors for trainer in (one, other)]
    assert all(np.array_equal(again[0][name], again[1][name]) for name in again[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_their_types_survive_the_disk(tmp_path: Path, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).to(dtype)
    state = ModelState(model, ("1.*",))
    OwnParameters(tmp_path, state).take()
    values = state.read_local()
    with torch.no_grad():
        for parameter in model[1].parameters():
            parameter.zero_()

    OwnParameters(tmp_path, state).load()

    assert all(np.array_equal(array, state.read_local()[name]) for name, array in values.items())


def test_an_abandoned_training_leaves_them_where_they_were() -> None:
    trainer = Trainer(Headed(), config(local_epochs=50, batch_size=5, **HEAD))
    looks = iter(range(1000))
    with pytest.raises(Abandoned):
        trainer.train(base(Headed()), should_stop=lambda: next(looks) > 20)

    clean = Trainer(Headed(), config(local_epochs=50, batch_size=5, **HEAD))
    results = [one.train(base(Headed(), 1)).tensors for one in (trainer, clean)]

    assert all(np.array_equal(results[0][name], results[1][name]) for name in results[0])


def test_an_evaluation_uses_them_and_does_not_move_them() -> None:
    settings: dict[str, Any] = {"validation_fraction": 0.3, "learning_rate": 0.3, "local_epochs": 10, **HEAD}
    trainer = Trainer(Headed(), config(**settings))
    before = trainer.check(base(Headed()))
    trainer.train(base(Headed()))
    moved = {name: array.copy() for name, array in head_of(trainer).items()}

    after = trainer.check(base(Headed(), work=Work(evaluate_every=1, personalise_steps=10)))

    # The body is that of before: the head alone has learnt.
    assert after.metrics["loss"] < before.metrics["loss"]
    assert all(np.array_equal(array, head_of(trainer)[name]) for name, array in moved.items())


def test_a_proximal_term_does_not_hold_them_back() -> None:
    def moved(mu: float) -> tuple[float, float]:
        trainer = Trainer(Headed(), config(local_epochs=5, **HEAD))
        start = head_of(trainer)["2.1.weight"].copy()
        body = trainer.train(base(Headed(), work=Work(proximal=mu))).tensors["0.weight"]
        return float(np.abs(body).sum()), float(np.abs(head_of(trainer)["2.1.weight"] - start).sum())

    (free_body, free_head), (held_body, held_head) = moved(0.0), moved(15.0)
    assert held_body < free_body / 3
    assert held_head > free_head / 3


def test_a_damaged_file_begins_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / FILE).write_bytes(b"nothing of use")
    trainer = Trainer(Headed(), config(folder=tmp_path, **HEAD))
    assert "cannot be read" in caplog.text
    assert not head_of(trainer)["2.0.num_batches_tracked"]


def test_the_whole_model_comes_together_again(tmp_path: Path) -> None:
    from safetensors.numpy import save_file  # noqa: PLC0415

    trainer = Trainer(Headed(), config(folder=tmp_path, **HEAD))
    trainer.train(base(Headed()))
    _, tensors = initial_parameters(Headed(), ("2.*",))
    save_file({name: array + 1 for name, array in tensors.items()}, tmp_path / "model.safetensors")

    model = load_model(Headed(), tmp_path / "model.safetensors", local_parameters=["2.*"], own_folder=tmp_path)

    values = {name: value.numpy() for name, value in model.state_dict().items()}
    assert np.array_equal(values["0.weight"], tensors["0.weight"] + 1)
    assert np.array_equal(values["2.1.weight"], head_of(trainer)["2.1.weight"])
    with pytest.raises(ModelMismatch):
        load_model(Headed(), tmp_path / "model.safetensors")


# ------------------------------------------------------------------------------------------- what is refused


def test_a_pattern_that_fits_nothing_names_what_there_is() -> None:
    with pytest.raises(TaskError, match=r"'hed\.\*' fits nothing that trains; there are 0\.weight"):
        Trainer(Headed(), config(local_parameters=["2.*", "hed.*"]))


def test_something_must_be_left_to_share() -> None:
    with pytest.raises(TaskError, match="nothing that could be trained together"):
        Trainer(Headed(), config(local_parameters=["*"]))


def test_gradients_do_not_train_them() -> None:
    with pytest.raises(ConfigError, match="asks for gradients"):
        Trainer(Headed(), config(**HEAD)).train(base(Headed(), mode=Mode.GRADIENT))


def test_an_evaluator_has_none() -> None:
    broker = MemoryBroker()
    with pytest.raises(ConfigError, match="evaluate_every"):
        run_evaluator(config(**HEAD), RUN, broker.worker(RUN, "e"), Headed())


def test_a_list_can_be_written_with_commas() -> None:
    values = WorkerConfig.model_validate({"local_parameters": "head.*, norm.weight"})
    assert values.local_parameters == ("head.*", "norm.weight")
