"""The loss on held-out data, and its gradient."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from broker.errors import TaskError
from broker.messages import Array
from tests.support.tasks import Line
from worker_client.config import WorkerConfig
from worker_client.judging import HeldOut
from worker_client.task import Examples, Task
from worker_client.training import initial_parameters


class Normed(Task):
    """With batch norm and dropout, whose behaviour in training is another one."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2))

    def data(self, shard: object) -> Examples:
        raise AssertionError("nobody trains here")

    def test_data(self) -> Examples:
        random = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(37, 3, generator=random), torch.arange(37) % 2)


def judge_of(task: Task, **settings: Any) -> HeldOut:
    return HeldOut(task, WorkerConfig(name="w", device="cpu", **settings))


def parameters_of(task: Task, seed: int = 0) -> dict[str, Array]:
    _, tensors = initial_parameters(task)
    source = np.random.default_rng(seed)
    return {
        name: array if array.dtype.kind == "i" else (array + source.random(array.shape)).astype(array.dtype)
        for name, array in tensors.items()
    }


@pytest.mark.parametrize("task", [Line(10), Normed()])
def test_the_gradient_is_how_the_loss_changes(task: Task) -> None:
    judge, parameters = judge_of(task), parameters_of(task)
    gradient = judge.gradient(parameters)

    for name in gradient:
        step = 1e-2 * np.random.default_rng(3).standard_normal(gradient[name].shape).astype(np.float32)
        losses = [judge.loss({**parameters, name: parameters[name] + sign * step}) for sign in (1, -1)]
        assert (losses[0] - losses[1]) / 2 == pytest.approx(float((gradient[name] * step).sum()), rel=0.02, abs=1e-5)
    assert gradient.keys() == {t.name for t in judge.spec.tensors if t.role == "parameter"}


def test_batches_make_no_difference_and_nothing_is_left_behind() -> None:
    parameters = parameters_of(Normed())
    one, other = judge_of(Normed(), batch_size=37), judge_of(Normed(), batch_size=5)

    assert one.loss(parameters) == pytest.approx(other.loss(parameters), rel=1e-6)
    first = one.gradient(parameters)
    one.loss(parameters_of(Normed(), 5))
    for name, array in one.gradient(parameters).items():
        np.testing.assert_array_equal(array, first[name])
        np.testing.assert_allclose(array, other.gradient(parameters)[name], rtol=1e-4, atol=1e-7)
    assert one.examples == 37


def test_what_a_task_lacks_or_raises_is_told() -> None:
    class Without(Line):
        def test_data(self) -> Examples | None:
            return None

    class Raising(Line):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            raise ZeroDivisionError("no such loss")

    with pytest.raises(TaskError, match="Without has no test_data"):
        judge_of(Without())
    judge = judge_of(Raising())
    with pytest.raises(TaskError, match=r"Raising\.loss raised ZeroDivisionError"):
        judge.loss(parameters_of(Line()))


def test_a_loss_without_gradient_has_one_of_zeros() -> None:
    class Constant(Line):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return torch.zeros(())

    gradient = judge_of(Constant()).gradient(parameters_of(Line()))
    assert not any(array.any() for array in gradient.values())
