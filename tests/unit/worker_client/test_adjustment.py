"""Local steps with what the run adds to their gradients, and what the steps weigh together."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from broker.errors import TaskError
from broker.messages import Mode, Work
from tests.unit.worker_client.models import Points, config, version_of
from worker_client.adjustment import Adjustment
from worker_client.context import TrainingContext, TrainingResult
from worker_client.steps import MOST_EFFORT, effort
from worker_client.task import Examples, Shard, Task
from worker_client.training import Trained, Trainer, build_model, initial_parameters


def train(task: Task, *, proximal: float = 0.0, mode: Mode = Mode.DELTA, **settings: Any) -> Trained:
    model, tensors = initial_parameters(task)
    version = version_of(model, tensors, mode=mode, work=Work(proximal=proximal))
    return Trainer(task, config(**settings)).train(version)


def test_the_proximal_term_is_mu_times_the_way_from_the_version() -> None:
    """FedProx: the gradient of loss + mu / 2 * |w - w_base|^2, written out with torch's own derivative."""
    task, mu = Points(examples=30), 0.7
    model = build_model(task)
    base = [p.detach().clone() for p in model.parameters()]
    inputs, targets = task.data(Shard("w0", 0, 1))[:]  # type: ignore[index]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(5):
        optimizer.zero_grad()
        way = sum((p - b).square().sum() for p, b in zip(model.parameters(), base, strict=True))
        (functional.cross_entropy(model(inputs), targets) + mu / 2 * way).backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    trained = train(task, proximal=mu, batch_size=30, local_steps=5, learning_rate=0.3)

    for (name, parameter), start in zip(model.named_parameters(), base, strict=True):
        np.testing.assert_allclose(trained.tensors[name], (parameter.detach() - start).numpy(), atol=2e-7)
    plain = train(task, batch_size=30, local_steps=5, learning_rate=0.3)
    assert any(np.abs(plain.tensors[n] - trained.tensors[n]).max() > 1e-3 for n in plain.tensors)


def test_a_large_mu_keeps_the_worker_at_the_version() -> None:
    def moved(mu: float) -> float:
        tensors = train(Points(), proximal=mu, local_epochs=20, learning_rate=0.1).tensors
        return float(np.sqrt(sum(float((a**2).sum()) for a in tensors.values())))

    assert moved(9.0) < moved(1.0) / 3 < moved(0.0) / 3


def test_a_gradient_is_taken_where_the_term_is_zero() -> None:
    plain, pulled = (train(Points(), mode=Mode.GRADIENT, proximal=mu).tensors for mu in (0.0, 5.0))
    assert all(np.array_equal(plain[name], pulled[name]) for name in plain)


class Own(Points):
    """A training of its own that knows nothing of what runs ask for."""

    adjusts = False

    def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for batch, _ in context.batches(dataset):
            optimizer.zero_grad()
            self.loss(model, batch).backward()  # type: ignore[no-untyped-call]
            if self.adjusts:
                context.adjust(model)
            optimizer.step()
        return TrainingResult(examples=len(dataset))


class Adjusting(Own):
    adjusts = True


def test_a_training_of_ones_own_that_leaves_the_term_out_is_told() -> None:
    assert train(Own()).steps == 0
    with pytest.raises(TaskError, match=r"Own\.train did not ask for it: call context\.adjust"):
        train(Own(), proximal=0.1)


def test_a_training_of_ones_own_can_ask_for_it() -> None:
    trained = train(Adjusting(), proximal=1.0, batch_size=10, learning_rate=0.1)
    assert trained.steps == 5
    assert any(np.abs(trained.tensors[n] - a).max() > 1e-4 for n, a in train(Own(), batch_size=10).tensors.items())


def test_it_can_say_its_steps_and_their_effort_itself() -> None:
    class Saying(Points):
        def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
            return TrainingResult(examples=1, steps=7, effort=3.5)

    trained = train(Saying())
    assert (trained.steps, trained.effort) == (7, 3.5)


def test_steps_are_counted() -> None:
    assert train(Points(examples=50), batch_size=10, local_epochs=3).steps == 15
    assert train(Points(examples=50), batch_size=10, local_steps=4).steps == 4
    assert train(Points(), mode=Mode.GRADIENT).steps == 0


def test_the_term_needs_a_version_only_where_there_is_one() -> None:
    model = nn.Linear(2, 1)
    model.weight.grad = torch.ones(1, 2)
    adjustment = Adjustment(2.0, {"weight": model.weight.detach() - 3.0, "bias": model.bias.detach()})

    adjustment(model)

    assert model.weight.grad.tolist() == [[7.0, 7.0]]
    assert model.bias.grad is None
    assert adjustment.steps == 1


# ---------------------------------------------------------------------------------------------------- effort


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_a_plain_step_weighs_one(optimizer: str) -> None:
    assert effort(17, config(optimizer=optimizer)) == 17.0


def test_efforts_are_those_of_the_paper() -> None:
    """Wang et al. 2020, section 4: momentum (tau - rho (1 - rho^tau) / (1 - rho)) / (1 - rho), and
    proximal SGD (1 - (1 - eta mu)^tau) / (eta mu)."""
    rho, eta, mu, tau = 0.9, 0.05, 0.4, 23
    momentum = (tau - rho * (1 - rho**tau) / (1 - rho)) / (1 - rho)
    assert effort(tau, config(momentum=rho)) == pytest.approx(momentum, rel=1e-12)
    proximal = (1 - (1 - eta * mu) ** tau) / (eta * mu)
    assert effort(tau, config(learning_rate=eta), mu) == pytest.approx(proximal, rel=1e-12)
    assert effort(1, config(momentum=0.5, weight_decay=3.0), 2.0) == 1.0


class Slope(Task):
    """The loss is the parameter, so that its gradient is 1 in every step."""

    def model(self) -> nn.Module:
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
        return model

    def data(self, shard: Shard) -> Examples:
        return TensorDataset(torch.zeros(6))

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        return model.get_parameter("w").sum()

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        return {}


@pytest.mark.parametrize(
    ("momentum", "proximal", "decay"), [(0.0, 0.0, 0.0), (0.9, 0.0, 0.0), (0.0, 2.0, 0.0), (0.5, 1.0, 0.5)]
)
def test_the_effort_is_what_unit_gradients_move(momentum: float, proximal: float, decay: float) -> None:
    trained = train(
        Slope(),
        proximal=proximal,
        batch_size=1,
        local_epochs=2,
        learning_rate=0.05,
        momentum=momentum,
        weight_decay=decay,
    )
    assert trained.steps == 12
    assert -trained.tensors["w"][0] / 0.05 == pytest.approx(trained.effort, rel=1e-12)


def test_an_optimiser_that_blows_up_has_the_largest_effort() -> None:
    assert effort(100_000, config(learning_rate=10.0, momentum=0.9), 100.0) == MOST_EFFORT
