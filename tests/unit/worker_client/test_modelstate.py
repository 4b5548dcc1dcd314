from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from torch import nn

from broker.errors import ModelMismatch, TaskError
from broker.messages import TensorRole
from broker.wire.section import Spread
from tests.unit.worker_client.models import Points
from worker_client.modelstate import ModelState
from worker_client.task import Task
from worker_client.training import build_model, initial_parameters, load_model


class Everything(nn.Module):
    """One tensor of each kind."""

    def __init__(self) -> None:
        super().__init__()
        self.trained = nn.Parameter(torch.ones(2, 3))
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("table", torch.arange(4, dtype=torch.int16))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("packed", torch.zeros(2, dtype=torch.uint8))
        self.register_buffer("cache", torch.zeros(2), persistent=False)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.output = nn.Linear(3, 5, bias=False)
        self.output.weight = self.embedding.weight


def value_of(model: nn.Module) -> torch.Tensor:
    return model.get_parameter("w").data


def tensor_model(**tensors: torch.Tensor) -> nn.Module:
    model = nn.Module()
    for name, tensor in tensors.items():
        model.register_parameter(name, nn.Parameter(tensor))
    return model


def test_trained_parameters_and_numeric_buffers_travel_and_the_rest_stays() -> None:
    spec = ModelState(Everything()).spec

    assert [(t.name, t.dtype, t.role) for t in spec.tensors] == [
        ("trained", "float32", TensorRole.PARAMETER),
        ("norm.weight", "float32", TensorRole.PARAMETER),
        ("norm.bias", "float32", TensorRole.PARAMETER),
        ("table", "int16", TensorRole.COUNTER),
        ("norm.running_mean", "float32", TensorRole.STATISTIC),
        ("norm.running_var", "float32", TensorRole.STATISTIC),
        ("norm.num_batches_tracked", "int64", TensorRole.COUNTER),
    ]
    assert spec.tensors[0].shape == (2, 3)
    assert spec.tensors[-1].shape == ()


def test_workers_with_other_frozen_weights_are_noticed() -> None:
    one, same, other = Everything(), Everything(), Everything()
    other.frozen.data[0] = 2

    assert len(ModelState(one).spec.frozen) == 64
    assert ModelState(one).spec == ModelState(same).spec
    assert ModelState(one).spec.frozen != ModelState(other).spec.frozen


def test_without_frozen_weights_there_is_no_digest() -> None:
    assert ModelState(nn.Linear(2, 2)).spec.frozen == ""


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.complex64, torch.bfloat16, torch.float8_e4m3fn])
def test_frozen_weights_may_be_of_types_that_do_not_travel(dtype: torch.dtype) -> None:
    model = nn.Linear(2, 2)
    model.extra = nn.Parameter(torch.ones(3).to(dtype), requires_grad=False)

    before = ModelState(model).spec.frozen
    model.extra = nn.Parameter(torch.zeros(3).to(dtype), requires_grad=False)

    assert before != ModelState(model).spec.frozen


def test_tied_weights_appear_once_and_stay_tied() -> None:
    # Given
    model = Tied()
    state = ModelState(model)
    assert [t.name for t in state.spec.tensors] == ["embedding.weight"]

    # When
    state.load({"embedding.weight": np.full((5, 3), 7, np.float32)})

    # Then
    assert model.output.weight is model.embedding.weight
    assert torch.equal(model.output.weight, torch.full((5, 3), 7.0))


def test_two_parameters_over_the_same_memory_are_refused() -> None:
    shared = torch.zeros(3)

    with pytest.raises(TaskError, match="one and two are different Parameter objects"):
        ModelState(tensor_model(one=shared, two=shared))


def test_a_complex_parameter_is_refused_with_advice() -> None:
    with pytest.raises(TaskError, match=r"'w' is of type complex64, which does not travel.*view_as_real"):
        ModelState(tensor_model(w=torch.zeros(2, dtype=torch.complex64)))


def test_a_complex_buffer_is_refused_with_advice() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("rotary", torch.zeros(2, dtype=torch.complex64))

    with pytest.raises(TaskError, match="persistent=False"):
        ModelState(model)


@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_lazy_parameter_is_refused_with_advice() -> None:
    with pytest.raises(TaskError, match="run the lazy module once"):
        ModelState(nn.LazyLinear(2))


def test_a_model_on_the_meta_device_is_refused() -> None:
    with pytest.raises(TaskError, match="no values yet"):
        ModelState(nn.Linear(2, 2, device="meta"))


def test_a_model_with_nothing_to_train_is_refused() -> None:
    with pytest.raises(TaskError, match="no parameter that trains"):
        ModelState(nn.Linear(2, 2).requires_grad_(False))


@pytest.mark.parametrize(
    ("dtype", "numpy"),
    [
        (torch.float16, np.float16),
        (torch.float32, np.float32),
        (torch.float64, np.float64),
        (torch.bfloat16, ml_dtypes.bfloat16),
    ],
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)])
def test_values_come_back_bit_for_bit(dtype: torch.dtype, numpy: Any, shape: tuple[int, ...]) -> None:
    # Given
    values = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    state, other = ModelState(tensor_model(w=values)), tensor_model(w=torch.zeros(shape, dtype=dtype))

    # When read here and loaded there, from an array that may not be written to
    arrays = state.read()
    arrays["w"].flags.writeable = False
    ModelState(other).load(arrays)

    # Then
    assert arrays["w"].dtype == np.dtype(numpy)
    assert arrays["w"].shape == shape
    assert torch.equal(value_of(other), values)


def in_pieces(array: Any) -> Spread:
    """``array`` as if it had come in chunks."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return Spread(array.shape, array.dtype, np.split(flat, [1, 3, 3, 4]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (2, 3, 4)])
def test_tensors_in_pieces_are_loaded_and_subtracted_like_whole_ones(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    random = torch.Generator().manual_seed(1)
    old, new = (torch.randn(shape, generator=random).to(dtype) for _ in range(2))
    values, changed = ModelState(tensor_model(w=old)).read(), ModelState(tensor_model(w=new))
    pieces = {name: in_pieces(array) for name, array in values.items()}

    assert np.array_equal(changed.change_since(pieces)["w"], changed.change_since(values)["w"])
    assert changed.change_since(pieces)["w"].shape == shape
    changed.load(pieces)
    assert np.array_equal(changed.read()["w"], values["w"])


def test_a_transposed_parameter_takes_pieces_in_its_own_order() -> None:
    model = tensor_model(w=torch.zeros(3, 2).t())
    values = np.arange(6, dtype=np.float32).reshape(2, 3)

    ModelState(model).load({"w": in_pieces(values)})

    assert np.array_equal(ModelState(model).read()["w"], values)
    assert not ModelState(model).change_since({"w": in_pieces(values)})["w"].any()


def test_what_was_read_does_not_change_when_training_goes_on() -> None:
    model = tensor_model(w=torch.zeros(3))
    arrays = ModelState(model).read()

    value_of(model).add_(1)

    assert arrays["w"].tolist() == [0, 0, 0]


def test_what_was_loaded_does_not_change_its_source() -> None:
    model = tensor_model(w=torch.zeros(3))
    source = {"w": np.ones(3, np.float32)}
    ModelState(model).load(source)

    value_of(model).add_(1)

    assert source["w"].tolist() == [1, 1, 1]


def test_a_transposed_parameter_is_read_and_loaded_in_its_own_order() -> None:
    model = tensor_model(w=torch.arange(6.0).reshape(2, 3).T)
    state = ModelState(model)

    assert state.read()["w"].tolist() == [[0, 3], [1, 4], [2, 5]]
    state.load({"w": np.arange(6, dtype=np.float32).reshape(3, 2)})
    assert value_of(model).tolist() == [[0, 1], [2, 3], [4, 5]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_changes_are_exact_in_the_tensors_own_dtype(dtype: torch.dtype) -> None:
    # Given
    random = torch.Generator().manual_seed(2)
    old, new = (torch.randn(1000, generator=random).to(dtype) for _ in range(2))
    model = tensor_model(w=old.clone())
    state = ModelState(model)
    before = state.read()

    # When
    value_of(model).copy_(new)

    # Then
    change = state.change_since(before)["w"]
    assert np.array_equal(change.astype(np.float64), (new - old).double().numpy())


def test_a_buffer_that_is_replaced_by_a_new_tensor_is_still_read() -> None:
    model = nn.BatchNorm1d(2)
    state = ModelState(model)
    before = state.read()

    model.num_batches_tracked = torch.tensor(5)

    assert state.change_since(before)["num_batches_tracked"] == 5


def test_a_counter_that_goes_down_gives_a_negative_change() -> None:
    model = nn.BatchNorm1d(2)
    state = ModelState(model)
    before = {**state.read(), "num_batches_tracked": np.array(7, np.int64)}

    change = state.change_since(before)["num_batches_tracked"]

    assert (change.dtype, int(change)) == (np.dtype(np.int64), -7)


def test_infinities_do_not_warn() -> None:
    model = tensor_model(w=torch.tensor([float("inf")]))
    state = ModelState(model)

    assert np.isnan(state.change_since(state.read())["w"]).all()


def test_sparse_gradients_become_dense() -> None:
    model = nn.Embedding(3, 2, sparse=True)
    model(torch.tensor([1])).sum().backward()

    assert ModelState(model).gradients()["weight"].tolist() == [[0, 0], [1, 1], [0, 0]]


def test_statistics_travel_as_values_and_counters_as_changes() -> None:
    # Given batch norm that has seen two batches since
    model = nn.BatchNorm1d(2)
    state = ModelState(model)
    state.load({**state.read(), "running_mean": np.full(2, 3, np.float32), "num_batches_tracked": np.array(5)})
    before = state.read()
    for _ in range(2):
        model(torch.ones(4, 2))

    # When
    told = state.buffers_since(before)

    # Then
    assert told["running_mean"].tolist() == pytest.approx([2.62, 2.62])
    assert int(told["num_batches_tracked"]) == 2
    model(torch.zeros(4, 2))
    assert told["running_mean"].tolist() == pytest.approx([2.62, 2.62])  # a copy


def test_a_runs_file_becomes_the_whole_model_again(tmp_path: Path) -> None:
    """Random frozen weights, tied weights and batch norm: none of it is lost by what travels."""

    class Whole(Task):
        seed = 3

        def model(self) -> nn.Module:
            model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 4))
            model[0].requires_grad_(requires_grad=False)
            model[3].weight = model[2].weight
            return model

    _, values = initial_parameters(Whole())
    trained = {name: np.asarray(array + 1) for name, array in values.items()}
    save_file(trained, tmp_path / "model.safetensors")

    model = load_model(Whole(), tmp_path / "model.safetensors")

    fresh = build_model(Whole())
    assert torch.equal(model.get_parameter("0.weight"), fresh.get_parameter("0.weight"))
    assert model.get_parameter("3.weight") is model.get_parameter("2.weight")
    assert torch.equal(model.get_parameter("2.weight"), fresh.get_parameter("2.weight") + 1)
    assert torch.equal(model.get_buffer("1.running_var"), fresh.get_buffer("1.running_var") + 1)
    with pytest.raises(ModelMismatch, match="another model"):
        load_model(Points(), tmp_path / "model.safetensors")
    with pytest.raises(TaskError, match="cannot be read"):
        load_model(Whole(), tmp_path / "nothing")
