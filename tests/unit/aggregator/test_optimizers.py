"""Server optimisers against torch's, and against the papers' formulae where torch has none."""

from __future__ import annotations

import math
import tracemalloc
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from aggregator.config import AggregatorConfig
from aggregator.optimizers import OPTIMIZERS, Adagrad, Adam, AdamW, Lamb, Optimizer, Sgd, Yogi, base, optimizer_of
from broker.errors import ConfigError
from broker.messages import Array, Mode

OURS: dict[str, Optimizer] = {
    "sgd": Sgd(0.1),
    "momentum": Sgd(0.1, 0.9),
    "nesterov": Sgd(0.1, 0.9, nesterov=True, weight_decay=0.01),
    "adam": Adam(0.01, weight_decay=0.1),
    "adamw": AdamW(0.01, weight_decay=0.1),
    "yogi": Yogi(0.01, weight_decay=0.1),
    "adagrad": Adagrad(0.1, weight_decay=0.1),
    "lamb": Lamb(0.01, weight_decay=0.1),
}
each = pytest.mark.parametrize("optimizer", OURS.values(), ids=OURS.keys())


def walk(optimizer: Optimizer, steps: list[Array], start: Array) -> Array:
    parameters, state = {"w": start}, optimizer.init()
    for step in steps:
        parameters, state = optimizer.apply(parameters, {"w": step.copy()}, state)
    return parameters["w"]


def steps_of(count: int, dtype: Any = np.float64, size: tuple[int, ...] = (4, 5)) -> list[Array]:
    return list(np.random.default_rng(3).normal(size=(count, *size)).astype(dtype))


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (Sgd(0.1), lambda p: torch.optim.SGD(p, lr=0.1)),
        (Sgd(0.1, momentum=0.9), lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)),
        (Sgd(0.1, weight_decay=0.3), lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3)),
        (
            Sgd(0.1, 0.9, nesterov=True, weight_decay=0.3),
            lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.3),
        ),
        (Adam(0.01), lambda p: torch.optim.Adam(p, lr=0.01)),
        (Adam(0.01, beta1=0.8), lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.8, 0.999))),
        (
            Adam(0.01, beta2=0.9, epsilon=1e-3, weight_decay=0.3),
            lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.9), eps=1e-3, weight_decay=0.3),
        ),
        (AdamW(0.01, weight_decay=0.3), lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.3)),
        (
            AdamW(0.1, 0.8, 0.9, 1e-2, 0.1),
            lambda p: torch.optim.AdamW(p, lr=0.1, betas=(0.8, 0.9), eps=1e-2, weight_decay=0.1),
        ),
        (Adagrad(0.1), lambda p: torch.optim.Adagrad(p, lr=0.1, eps=1e-3, initial_accumulator_value=1e-6)),
        (
            Adagrad(0.1, 0.1, 0.3),
            lambda p: torch.optim.Adagrad(p, lr=0.1, eps=0.1, initial_accumulator_value=0.01, weight_decay=0.3),
        ),
    ],
)
def test_they_step_like_torchs(ours: Optimizer, theirs: Callable[[Any], torch.optim.Optimizer]) -> None:
    start, steps = np.random.default_rng(1).normal(size=(4, 5)), steps_of(20)
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimizer = theirs([parameter])
    for step in steps:
        parameter.grad = torch.tensor(step)
        optimizer.step()

    np.testing.assert_allclose(walk(ours, steps, start), parameter.detach().numpy(), rtol=1e-10)


def test_yogi_follows_the_papers_formula() -> None:
    """Reddi et al. 2021, algorithm 2, FedYogi, for one number by hand. Here beta1 0.9, beta2 0.99, tau 1e-3."""
    x, m, v = 1.0, 0.0, 1e-3**2
    for d in (0.5, -2.0, 0.1, 0.0, 3.0):
        m = 0.9 * m + 0.1 * d
        v = v - 0.01 * d * d * math.copysign(1.0, v - d * d) * (v != d * d)
        x -= 0.1 * m / (math.sqrt(v) + 1e-3)

    result = walk(Yogi(0.1), [np.array([d]) for d in (0.5, -2.0, 0.1, 0.0, 3.0)], np.array([1.0]))

    assert result[0] == pytest.approx(x, rel=1e-12)
    # The second moment rises from 1e-6 by 0.01 * 0.25: the first step is 0.1 * 0.05 / (sqrt(0.002501) + 0.001).
    first = walk(Yogi(0.1), [np.array([0.5])], np.array([1.0]))
    assert first[0] == pytest.approx(1 - 0.005 / (math.sqrt(0.002501) + 0.001), rel=1e-12)


def test_lamb_follows_the_papers_formula() -> None:
    """You et al. 2020, algorithm 2, in plain numpy over whole tensors."""
    random = np.random.default_rng(5)
    x, m, v = random.normal(size=300), np.zeros(300), np.zeros(300)
    start, steps = x.copy(), steps_of(5, size=(300,))
    for t, d in enumerate(steps, 1):
        m, v = 0.9 * m + 0.1 * d, 0.999 * v + 0.001 * d * d
        r = (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-6)
        u = r + 0.1 * x
        x = x - 0.01 * np.linalg.norm(x) / np.linalg.norm(u) * u

    # The ratio is rounded to float32.
    np.testing.assert_allclose(walk(Lamb(0.01, weight_decay=0.1), steps, start), x, rtol=1e-6)
    # A first step moves the tensor by its norm times the rate, exactly.
    moved = walk(Lamb(0.01), steps[:1], start)
    assert np.linalg.norm(moved - start) / np.linalg.norm(start) == pytest.approx(0.01, rel=1e-6)


def test_lamb_moves_what_is_zero() -> None:
    assert walk(Lamb(0.01), [np.ones(3)], np.zeros(3)) == pytest.approx([-0.01] * 3, rel=1e-4)
    assert walk(Lamb(0.01), [np.zeros(3)], np.ones(3)).tolist() == [1, 1, 1]


@each
def test_how_a_tensor_is_cut_makes_no_difference(optimizer: Optimizer, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = steps_of(3, np.float32, (7, 11))
    whole = walk(optimizer, steps, np.ones((7, 11), np.float32))

    monkeypatch.setattr(base, "BLOCK", 10)
    cut = walk(optimizer, steps, np.ones((7, 11), np.float32))

    # The norms of LAMB are sums, whose last bits may differ before they are rounded.
    np.testing.assert_allclose(cut, whole, rtol=1e-6 if isinstance(optimizer, Lamb) else 0)


@each
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_what_comes_in_is_not_written_and_dtypes_stay(optimizer: Optimizer, dtype: Any) -> None:
    wide = np.float64 if dtype is np.float64 else np.float32
    parameters, state = (
        {"w": np.ones(5, dtype), "none": np.ones((0, 2), dtype), "one": np.array(1, dtype)},
        optimizer.init(),
    )
    for _ in range(3):
        before = {name: a.copy() for name, a in parameters.items()}
        slots = {s: {name: a.copy() for name, a in tensors.items()} for s, tensors in state.slots.items()}
        for array in [*parameters.values(), *(a for tensors in state.slots.values() for a in tensors.values())]:
            array.flags.writeable = False
        direction = {name: np.full(a.shape, 0.5, wide) for name, a in parameters.items()}

        result, after = optimizer.apply(parameters, direction, state)

        assert not direction
        assert {name: (a.dtype, a.shape) for name, a in result.items()} == {
            name: (a.dtype, a.shape) for name, a in parameters.items()
        }
        assert all(np.array_equal(parameters[name], before[name]) for name in before)
        assert all(np.array_equal(state.slots[s][name], a) for s, own in slots.items() for name, a in own.items())
        assert after.slots.keys() == state.slots.keys()
        assert after.step == state.step + 1
        assert {a.dtype for tensors in after.slots.values() for a in tensors.values()} <= {np.dtype(wide)}
        assert result["one"] < parameters["one"]
        parameters, state = result, after


@pytest.mark.parametrize(
    ("optimizer", "models"),
    [(Sgd(0.1), 0), (Sgd(0.1, weight_decay=0.1), 0), (OURS["nesterov"], 1), (OURS["adagrad"], 1)]
    + [(OURS[name], 2) for name in ("adam", "adamw", "yogi", "lamb")],
)
def test_a_step_takes_no_more_memory_than_its_results(optimizer: Optimizer, models: int) -> None:
    size = 1 << 22
    parameters = {"w": np.ones(size, np.float32)}
    result, state = optimizer.apply(parameters, {"w": np.ones(size, np.float32)}, optimizer.init())
    direction = {"w": np.ones(size, np.float32)}
    tracemalloc.start()

    optimizer.apply(result, direction, state)

    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < models * size * 4 + 8 * base.BLOCK * 4


@each
def test_a_schedule_scales_the_rate_and_nothing_else(optimizer: Optimizer) -> None:
    start = np.ones(3)
    full = start - walk(optimizer, steps_of(1, size=(3,)), start)
    half = start - walk(optimizer.scaled(0.5), steps_of(1, size=(3,)), start)

    np.testing.assert_allclose(half, full / 2, rtol=1e-9)


def test_settings_reach_them() -> None:
    def made(**settings: Any) -> Optimizer:
        return optimizer_of(AggregatorConfig(**settings).recipe())

    assert made() == Sgd(1.0)
    assert made(momentum=0.9, nesterov=True, weight_decay=0.1) == Sgd(1.0, 0.9, nesterov=True, weight_decay=0.1)
    assert made(optimizer="adam") == Adam(0.01, 0.9, 0.999, 1e-8)
    assert made(optimizer="adam", mode=Mode.GRADIENT) == Adam(0.001, 0.9, 0.999, 1e-8)
    assert made(optimizer="adamw", momentum=0.8, beta2=0.9, epsilon=0.1) == AdamW(0.01, 0.8, 0.9, 0.1)
    assert made(optimizer="yogi") == Yogi(0.01, 0.9, 0.99, 1e-3)
    assert made(optimizer="adagrad", learning_rate=0.5) == Adagrad(0.5, 1e-3)
    assert made(optimizer="adagrad") == Adagrad(0.1, 1e-3)
    assert made(optimizer="lamb", weight_decay=0.1) == Lamb(0.01, 0.9, 0.999, 1e-6, 0.1)
    assert set(OPTIMIZERS.own) == {"sgd", "adam", "adamw", "yogi", "adagrad", "lamb"}


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"optimizer": "adm"}, "no optimizer is called 'adm'; did you mean 'adam'"),
        ({"strategy": "meen"}, "no strategy is called 'meen'; did you mean 'mean'"),
        ({"staleness": "polinomial"}, "did you mean 'polynomial'"),
        ({"nesterov": True}, "nesterov is for optimizer = 'sgd' with a momentum"),
        ({"nesterov": True, "optimizer": "adam", "momentum": 0.9}, "nesterov is for"),
        ({"optimizer": "adagrad", "momentum": 0.9}, "adagrad has no momentum"),
        ({"optimizer": "logging:getLogger"}, "cannot be made of these settings: TypeError"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AggregatorConfig(**settings)


def test_a_command_may_not_name_code() -> None:
    with pytest.raises(ConfigError, match="no optimizer is called 'os:getcwd'"):
        AggregatorConfig().changed({"optimizer": "os:getcwd"})
