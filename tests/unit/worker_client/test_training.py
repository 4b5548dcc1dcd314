from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from broker.errors import TaskError
from broker.messages import Mode
from tests.unit.worker_client.models import Points, config, train_once, version_of
from worker_client.batches import index_batches
from worker_client.context import Abandoned
from worker_client.steps import gradient
from worker_client.task import Examples, Shard, Task, TrainingContext, TrainingResult
from worker_client.training import Trainer, build_model, evaluate, initial_parameters


class Normed(Points):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


class Noisy(Points):
    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 2))


class Partly(Points):
    """One parameter is never used, one is frozen."""

    def model(self) -> nn.Module:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
        model[0].requires_grad_(False)
        model.register_parameter("unused", nn.Parameter(torch.ones(3)))
        return model


def same(one: Any, two: Any) -> bool:
    return one.keys() == two.keys() and all(np.array_equal(one[name], two[name]) for name in one)


# ------------------------------------------------------------------------------------------------- gradients


@pytest.mark.parametrize("batch_size", [1, 7, 16, 49, 50, 1000])
def test_the_gradient_does_not_depend_on_the_batch_size(batch_size: int) -> None:
    # Given the gradient of the mean loss over the shard, computed at once
    task = Points()
    model = build_model(task)
    inputs, targets = task.data(Shard("w0", 0, 1))[:]  # type: ignore[index]
    loss = functional.cross_entropy(model(inputs), targets)
    loss.backward()  # type: ignore[no-untyped-call]

    # When
    trained = train_once(task, mode=Mode.GRADIENT, batch_size=batch_size)

    # Then
    assert trained.examples == 50
    assert trained.metrics["loss"] == pytest.approx(loss.item(), rel=1e-6)
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        np.testing.assert_allclose(trained.tensors[name], parameter.grad.numpy(), rtol=1e-5, atol=1e-6)


def test_a_gradient_leaves_the_parameters_alone_and_reports_the_buffers_changes() -> None:
    task = Normed()
    model, tensors = initial_parameters(task)

    trained = train_once(task, mode=Mode.GRADIENT, batch_size=25)

    assert list(trained.tensors) == [t.name for t in model.tensors]
    assert int(trained.tensors["1.num_batches_tracked"]) == 2
    assert np.abs(trained.tensors["1.running_mean"]).sum() > 0
    assert int(tensors["1.num_batches_tracked"]) == 0


def test_local_steps_bound_a_gradients_batches() -> None:
    assert train_once(Points(), mode=Mode.GRADIENT, batch_size=8, local_steps=3).examples == 24


def test_an_unused_parameter_has_a_gradient_of_zeros_and_a_frozen_one_none() -> None:
    tensors = train_once(Partly(), mode=Mode.GRADIENT).tensors

    assert list(tensors) == ["unused", "1.weight", "1.bias"]
    assert tensors["unused"].tolist() == [0, 0, 0]
    assert np.abs(tensors["1.weight"]).sum() > 0


def test_clipping_bounds_the_gradients_norm() -> None:
    def norm(**settings: Any) -> float:
        tensors = train_once(Points(), mode=Mode.GRADIENT, **settings).tensors
        return float(np.sqrt(sum(float((a**2).sum()) for a in tensors.values())))

    assert norm() > 0.1
    assert norm(clip_norm=0.1) == pytest.approx(0.1, rel=1e-4)


def test_two_gradients_do_not_share_memory() -> None:
    task = Points()
    trainer = Trainer(task, config())
    model, tensors = initial_parameters(task)
    first = trainer.train(version_of(model, tensors, mode=Mode.GRADIENT))
    copies = {name: array.copy() for name, array in first.tensors.items()}

    trainer.train(version_of(model, {n: a + 1 for n, a in tensors.items()}, 1, mode=Mode.GRADIENT))

    assert same(first.tensors, copies)


# --------------------------------------------------------------------------------------------------- deltas


def test_the_delta_is_new_minus_old() -> None:
    # Given a plain loop of torch over the same batches
    task = Points(examples=30)
    model = build_model(task)
    inputs, targets = task.data(Shard("w0", 0, 1))[:]  # type: ignore[index]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(4):
        optimizer.zero_grad()
        functional.cross_entropy(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    old = initial_parameters(task)[1]

    # When every batch is the whole shard, so that shuffling only rounds
    trained = train_once(task, batch_size=30, local_epochs=4, learning_rate=0.1)

    # Then
    assert trained.examples == 30
    for name, parameter in model.named_parameters():
        np.testing.assert_allclose(trained.tensors[name], parameter.detach().numpy() - old[name], atol=1e-6)


def test_the_delta_is_exactly_what_training_changed() -> None:
    # Given a training that sets every value
    class Setting(Points):
        def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(0.3)
            return TrainingResult(examples=1)

    old = initial_parameters(Setting())[1]

    trained = train_once(Setting())

    assert same(trained.tensors, {name: np.float32(0.3) - array for name, array in old.items()})


def test_parameters_are_what_training_left_in_the_model() -> None:
    task = Normed()
    _, start = initial_parameters(task)

    delta = train_once(task, mode=Mode.DELTA, local_epochs=2)
    trained = train_once(task, mode=Mode.PARAMETERS, local_epochs=2)

    assert list(trained.tensors) == list(delta.tensors)
    for name, values in trained.tensors.items():
        is_parameter = "running" not in name and "batches" not in name
        # Buffers travel as ever: statistics by value, counters by their change.
        moved = np.subtract(values, start[name]) if is_parameter else values
        np.testing.assert_array_equal(moved, delta.tensors[name])
        assert not np.shares_memory(values, start[name])


def test_a_delta_counts_batches_in_integer_buffers() -> None:
    tensors = train_once(Normed(), batch_size=10, local_epochs=3).tensors

    assert tensors["1.num_batches_tracked"].dtype == np.int64
    assert int(tensors["1.num_batches_tracked"]) == 15


@pytest.mark.parametrize(("steps", "examples"), [(2, 20), (5, 50), (12, 50)])
def test_local_steps_take_the_place_of_epochs(steps: int, examples: int) -> None:
    trained = train_once(Normed(), batch_size=10, local_steps=steps, local_epochs=100)

    assert int(trained.tensors["1.num_batches_tracked"]) == steps
    assert trained.examples == examples


@pytest.mark.parametrize("mode", Mode)
def test_a_last_batch_of_one_does_not_stop_batch_norm(mode: Mode) -> None:
    trained = train_once(Normed(examples=9), mode=mode, batch_size=4)

    assert trained.examples == 9
    assert int(trained.tensors["1.num_batches_tracked"]) == 2


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_local_training_lowers_the_loss(optimizer: str) -> None:
    trainer = Trainer(Points(), config(optimizer=optimizer, local_epochs=60, learning_rate=0.05))
    model, old = initial_parameters(Points())
    before = trainer.evaluate(version_of(model, old)).metrics

    delta = trainer.train(version_of(model, old)).tensors
    after = trainer.evaluate(version_of(model, {n: a + delta[n] for n, a in old.items()}, 1)).metrics

    assert after["loss"] < before["loss"] / 1.5
    assert after["accuracy"] > 0.8


def test_bfloat16_trains_in_bfloat16() -> None:
    tensors = train_once(Points(dtype=torch.bfloat16), local_epochs=2).tensors

    assert {array.dtype.name for array in tensors.values()} == {"bfloat16"}
    assert all(np.abs(array.astype(np.float32)).sum() > 0 for array in tensors.values())


def test_a_training_that_diverges_still_returns() -> None:
    trained = train_once(Points(), local_epochs=50, learning_rate=1000.0, weight_decay=1000.0)

    assert not np.isfinite(trained.tensors["0.weight"]).all()
    assert not np.isfinite(trained.metrics["loss"])


# ---------------------------------------------------------------------------------------------- determinism


@pytest.mark.parametrize("task", [Points(), Normed(), Noisy()])
@pytest.mark.parametrize("mode", Mode)
def test_the_same_inputs_give_the_same_update(task: Task, mode: Mode) -> None:
    first = train_once(task, mode=mode, batch_size=8)
    torch.manual_seed(123)
    second = train_once(task, mode=mode, batch_size=8)

    assert same(first.tensors, second.tensors)


@pytest.mark.parametrize("other", [{"version": 1}, {"ordinal": 1}, {"name": "w1"}])
def test_another_version_turn_or_worker_shuffles_otherwise(other: dict[str, Any]) -> None:
    assert not same(train_once(Points(), batch_size=8).tensors, train_once(Points(), batch_size=8, **other).tensors)


def test_a_trainer_has_no_memory_of_earlier_trainings() -> None:
    task = Normed()
    model, tensors = initial_parameters(task)
    trainer = Trainer(task, config(momentum=0.9))
    first = trainer.train(version_of(model, tensors))
    trainer.train(version_of(model, {n: a + 1 for n, a in tensors.items()}, 1))

    assert same(first.tensors, trainer.train(version_of(model, tensors)).tensors)


def test_all_workers_build_the_same_model_and_nobody_elses_random_numbers_change() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)

    one = initial_parameters(Points())
    drawn = torch.rand(3)
    two = initial_parameters(Points())

    assert torch.equal(drawn, expected)
    assert one[0] == two[0]
    assert same(one[1], two[1])


def test_a_task_of_another_seed_builds_another_model() -> None:
    class Other(Points):
        seed = 1

    assert not same(initial_parameters(Points())[1], initial_parameters(Other())[1])


# ----------------------------------------------------------------------------------------- the user's own


class Returning(Points):
    """A training that returns its tensors."""

    def __init__(self, tensors: Callable[[nn.Module], dict[str, Any]]) -> None:
        super().__init__()
        self.tensors = tensors

    def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
        return TrainingResult(examples=3, metrics={"mine": 1}, tensors=self.tensors(model))


@pytest.mark.parametrize("mode", Mode)
def test_a_training_may_return_the_tensors_itself(mode: Mode) -> None:
    task = Returning(
        lambda model: {n: torch.full_like(p, 0.5, dtype=torch.float64) for n, p in model.named_parameters()}
    )

    trained = train_once(task, mode=mode)

    assert (trained.examples, dict(trained.metrics)) == (3, {"mine": 1.0})
    assert all((array == 0.5).all() and array.dtype == np.float32 for array in trained.tensors.values())


def test_returned_tensors_must_be_the_models() -> None:
    with pytest.raises(TaskError, match=r"missing \['0.bias'.*unknown \['what'\]"):
        train_once(Returning(lambda model: {"0.weight": np.zeros((8, 4)), "what": np.zeros(1)}))


def test_returned_tensors_must_have_the_models_shapes() -> None:
    with pytest.raises(TaskError, match=r"returned 0.weight in shape \(1,\); the model's is \(8, 4\)"):
        train_once(Returning(lambda model: {n: np.zeros(1) for n, _ in model.named_parameters()}))


def test_a_training_must_return_a_result() -> None:
    class Nothing(Points):
        def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
            return None  # type: ignore[return-value]

    with pytest.raises(TaskError, match="train returned a NoneType"):
        train_once(Nothing())


def test_a_metric_must_have_a_name_that_travels() -> None:
    class Named(Points):
        def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
            return TrainingResult(examples=1, metrics={"my loss": 1.0})

    with pytest.raises(TaskError, match="metric 'my loss'"):
        train_once(Named())


class WithLoss(Points):
    def __init__(self, loss: Callable[[nn.Module, Any], Any]) -> None:
        super().__init__()
        self.given = loss

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return self.given(model, batch)  # type: ignore[no-any-return]


def test_an_error_in_the_users_code_says_where_and_keeps_its_cause() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("labels")

    with pytest.raises(TaskError, match=r"WithLoss.train raised KeyError: 'labels' \(test_training.py:\d+\)") as caught:
        train_once(WithLoss(loss))
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_loss_for_each_example_is_refused() -> None:
    with pytest.raises(TaskError, match=r"returned a tensor of shape \[32\]; it must be the mean"):
        train_once(WithLoss(lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1], reduction="none")))


def test_data_that_raises_is_blamed() -> None:
    class Missing(Points):
        def data(self, shard: Shard) -> Examples:
            raise FileNotFoundError("images/")

    with pytest.raises(TaskError, match=r"Missing.data raised FileNotFoundError: images/ \(test_training.py:\d+\)"):
        train_once(Missing())


def test_an_empty_shard_is_named() -> None:
    with pytest.raises(TaskError, match="shard 2/4 of worker 'w0': no examples"):
        train_once(Points(examples=0), shard="2/4")


def test_data_without_a_length_is_refused() -> None:
    class Streaming(Points):
        def data(self, shard: Shard) -> Examples:
            return iter([])  # type: ignore[return-value]

    with pytest.raises(TaskError, match="must have a length"):
        train_once(Streaming())


def test_a_model_must_be_a_module() -> None:
    class Wrong(Points):
        def model(self) -> nn.Module:
            return {"weights": 1}  # type: ignore[return-value]

    with pytest.raises(TaskError, match=r"Wrong\.model returned a dict"):
        build_model(Wrong())


def test_any_sequence_of_examples_and_any_batch_will_do() -> None:
    # Given ratings, in dictionaries, with a collate function and a loss of the user's own
    class Ratings(Task):
        def model(self) -> nn.Module:
            return nn.Embedding(3, 1)

        def data(self, shard: Shard) -> Examples:
            return [{"item": i % 3, "stars": float(i % 5)} for i in range(11)]

        def collate(self, examples: list[Any]) -> Any:
            return {
                "item": torch.tensor([e["item"] for e in examples]),
                "stars": torch.tensor([e["stars"] for e in examples]),
            }

        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            return functional.mse_loss(model(batch["item"])[:, 0], batch["stars"])

    assert train_once(Ratings(), batch_size=4).examples == 11


def test_float_targets_mean_squared_error_whatever_their_last_dimension() -> None:
    class Line(Points):
        def model(self) -> nn.Module:
            return nn.Linear(4, 1)

        def data(self, shard: Shard) -> Examples:
            inputs = torch.ones(20, 4)
            return TensorDataset(inputs, inputs.sum(1))

    class Column(Line):
        def data(self, shard: Shard) -> Examples:
            inputs = torch.ones(20, 4)
            return TensorDataset(inputs, inputs.sum(1, keepdim=True))

    assert same(train_once(Line(), batch_size=20).tensors, train_once(Column(), batch_size=20).tensors)


def test_training_gives_up_between_two_batches() -> None:
    # Given a stop that is asked for after the second batch
    answers = deque([False, False, True])
    batches = []

    class Counting(Points):
        def loss(self, model: nn.Module, batch: Any) -> Tensor:
            batches.append(batch)
            return super().loss(model, batch)

    task = Counting()
    model, tensors = initial_parameters(task)

    # When
    with pytest.raises(Abandoned):
        Trainer(task, config(batch_size=5)).train(version_of(model, tensors), should_stop=answers.popleft)

    # Then
    assert len(batches) == 2


def test_gradient_steps_can_be_called_by_a_training_of_the_users_own() -> None:
    class Scaled(Points):
        def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
            result = gradient(self, model, dataset, context)
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.grad *= 2
            return result

    plain, scaled = (train_once(task, mode=Mode.GRADIENT).tensors for task in (Points(), Scaled()))

    assert same({name: 2 * array for name, array in plain.items()}, scaled)


# --------------------------------------------------------------------------------------------- evaluation


def test_evaluation_is_a_mean_over_examples_whatever_the_batch_size() -> None:
    task = Normed(examples=50)
    model = build_model(task)
    dataset = task.test_data()
    assert dataset is not None

    results = [evaluate(task, model, dataset, batch_size=size) for size in (1, 7, 50)]

    assert results[0].keys() == {"loss", "accuracy"}
    assert results[0] == pytest.approx(results[1], rel=1e-5)
    assert results[0] == pytest.approx(results[2], rel=1e-5)


def test_evaluation_runs_in_eval_mode_and_restores_each_modules_mode() -> None:
    task = Normed()
    model = build_model(task)
    model.train()
    model.get_submodule("1").eval()
    modes = []
    model.register_forward_pre_hook(lambda module, _: modes.append(module.training))

    evaluate(task, model, task.data(Shard("w", 0, 1)))

    assert set(modes) == {False}
    assert [module.training for module in model.modules()] == [True, True, False, True]


def test_an_evaluator_needs_held_out_data() -> None:
    class Without(Points):
        def test_data(self) -> Examples | None:
            return None

    with pytest.raises(TaskError, match="Without has no test_data"):
        Trainer(Without(), config()).load_test_data()


def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(TaskError, match="use 'auto' or 'cpu'"):
        Trainer(Points(), config(device="mps"))


@pytest.mark.parametrize("length", range(1, 14))
@pytest.mark.parametrize("size", [1, 2, 3, 4, 20])
@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(3)])
def test_each_example_is_in_one_batch(length: int, size: int, generator: torch.Generator | None) -> None:
    batches = index_batches(length, size, generator)

    assert sorted(index for batch in batches for index in batch) == list(range(length))
    assert all(len(batch) <= size + (size > 1) for batch in batches)
    assert length == 1 or size == 1 or min(map(len, batches)) > 1
