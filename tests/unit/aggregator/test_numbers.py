"""Golden numbers: FedBuff, FedAvg and gradient descent, computed by hand or by a plain reference."""

from __future__ import annotations

import math
from typing import Literal

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.config import AggregatorConfig
from aggregator.core.rounds import Buffered, Synchronous
from aggregator.optimizers import Adam, Optimizer, Sgd
from aggregator.staleness import constant, polynomial
from aggregator.strategies import Mean
from broker.messages import Array, Mode
from tests.support.builders import rules_of, snapshot_of, update_of, vector
from tests.unit.aggregator.driver import Driver


def test_fedbuff_with_stale_updates_by_hand() -> None:
    """Nguyen et al. 2022, algorithm 1, K = 2, server learning rate 0.5, s(tau) = (1 + tau)^-0.5.

    Round 1: two fresh deltas, 2 and 4: w1 = 10 + 0.5 * (2 + 4) / 2 = 11.5.
    Round 2: a fresh delta 6 and a stale one, 8 from version 0, so tau = 1:
             w2 = 11.5 + 0.5 * (6 + 8 / sqrt(2)) / 2.
    Round 3: tau = 2 and tau = 1: w3 = w2 + 0.5 * (1 / sqrt(3) + 2 / sqrt(2)) / 2.
    """
    driver = Driver(
        rules_of(rounds=Buffered(size=2, max_staleness=10), optimizer=Sgd(0.5)),
        snapshot_of({"w": vector(10, dtype=np.float64)}),
    )
    expected = [11.5, 11.5 + 0.5 * (6 + 8 / math.sqrt(2)) / 2]
    expected.append(expected[1] + 0.5 * (1 / math.sqrt(3) + 2 / math.sqrt(2)) / 2)
    rounds = [[(2, 0), (4, 0)], [(6, 1), (8, 0)], [(1, 0), (2, 1)]]

    seq = 0
    for version, updates in enumerate(rounds):
        for delta, base in updates:
            driver.update(update_of({"w": vector(delta, dtype=np.float64)}, seq=seq, base_version=base))
            seq += 1
        assert driver.parameters["w"][0] == pytest.approx(expected[version], rel=1e-15)

    entries = driver.records[2].updates
    assert [entry.staleness for entry in entries] == [2, 1]
    assert [entry.weight for entry in entries] == [pytest.approx(3**-0.5), pytest.approx(2**-0.5)]


def test_a_fresh_update_has_staleness_0_and_weight_1() -> None:
    assert polynomial(0.5)(0) == 1.0
    assert polynomial(0.5)(3) == 0.5
    assert constant()(7) == 1.0


def test_fedavg_weighs_by_examples() -> None:
    driver = Driver(
        rules_of(rounds=Synchronous(minimum=2), strategy=Mean("examples", constant())),
        snapshot_of({"w": vector(1, 1)}),
    )
    driver.hello("a", "b")

    driver.update(update_of({"w": vector(3, 0)}, worker="a", examples=10))
    driver.update(update_of({"w": vector(0, 8)}, worker="b", examples=30))

    np.testing.assert_array_equal(driver.parameters["w"], [1 + 30 / 40, 1 + 240 / 40])


WEIGHTS = st.lists(st.integers(1, 1000), min_size=1, max_size=6)


@given(examples=WEIGHTS, seed=st.integers(0, 2**32 - 1))
def test_buffered_with_k_of_the_cohort_and_no_staleness_is_fedavg_bit_for_bit(examples: list[int], seed: int) -> None:
    """The same updates in the same order through both kinds of round, by examples and uniform."""
    random = np.random.default_rng(seed)
    deltas = [random.normal(size=(3, 4)).astype(np.float32) for _ in examples]
    weightings: tuple[Literal["examples", "uniform"], ...] = ("examples", "uniform")
    for weighting in weightings:
        results = []
        for rounds in (Buffered(size=len(examples), max_staleness=0), Synchronous(minimum=len(examples))):
            strategy = Mean(weighting, polynomial(0.5))
            driver = Driver(rules_of(rounds=rounds, strategy=strategy), snapshot_of({"w": random_model()}))
            driver.hello(*(f"w{i}" for i in range(len(examples))))
            for i, (n, delta) in enumerate(zip(examples, deltas, strict=True)):
                driver.update(update_of({"w": delta}, worker=f"w{i}", examples=n))
            assert driver.machine.version == 1
            results.append(driver.parameters["w"].tobytes())
        assert results[0] == results[1]


def random_model() -> Array:
    return np.random.default_rng(7).normal(size=(3, 4)).astype(np.float32)


@given(examples=WEIGHTS, seed=st.integers(0, 2**32 - 1))
def test_fedavg_is_the_mean_of_the_workers_models(examples: list[int], seed: int) -> None:
    """Plain reference: the average of the trained models, weighed by examples, in double precision."""
    random = np.random.default_rng(seed)
    start = random_model()
    models = [start + random.normal(size=start.shape).astype(np.float32) for _ in examples]
    strategy = Mean("examples", constant())
    driver = Driver(
        rules_of(rounds=Synchronous(minimum=len(models)), strategy=strategy), snapshot_of({"w": start.copy()})
    )
    driver.hello(*(f"w{i}" for i in range(len(models))))

    for i, (n, model) in enumerate(zip(examples, models, strict=True)):
        driver.update(update_of({"w": model - start}, worker=f"w{i}", examples=n))

    reference = np.average([model.astype(np.float64) for model in models], axis=0, weights=examples)
    np.testing.assert_allclose(driver.parameters["w"], reference, atol=1e-5)


def test_gradient_mode_descends() -> None:
    driver = Driver(
        rules_of(mode=Mode.GRADIENT, rounds=Buffered(size=1, max_staleness=0), optimizer=Sgd(0.1)),
        snapshot_of({"w": vector(1, 2)}),
    )

    driver.update(update_of({"w": vector(10, -10)}, mode=Mode.GRADIENT))

    np.testing.assert_allclose(driver.parameters["w"], [0, 3], rtol=1e-6)


@pytest.mark.parametrize("optimizer", [Sgd(1.0), Sgd(0.5, momentum=0.9), Adam(0.1)])
def test_scalars_and_empty_tensors_step_too(optimizer: Optimizer) -> None:
    tensors = {"scalar": np.array(2.0, np.float32), "empty": np.zeros((0, 3), np.float32)}
    driver = Driver(rules_of(rounds=Buffered(size=1, max_staleness=0), optimizer=optimizer), snapshot_of(tensors))

    for seq in range(3):
        driver.update(update_of({n: np.ones_like(a) for n, a in tensors.items()}, seq=seq, base_version=seq))

    assert driver.parameters["scalar"] > 2
    assert driver.parameters["scalar"].shape == ()
    assert driver.parameters["empty"].shape == (0, 3)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_sums_of_half_precision_are_kept_wide(dtype: type) -> None:
    """A thousand small updates: in half precision the sum would stop growing long before."""
    driver = Driver(rules_of(rounds=Buffered(size=1000, max_staleness=0)), snapshot_of({"w": vector(0, dtype=dtype)}))

    for seq in range(1000):
        driver.update(update_of({"w": vector(1, dtype=dtype)}, seq=seq))

    assert driver.parameters["w"].dtype == dtype
    assert float(driver.parameters["w"][0]) == 1.0


def test_statistics_take_the_mean_of_the_values_and_counters_the_mean_of_the_changes() -> None:
    """Two stale updates whose variances are small: changes added up would give 1 + 2 * (0.1 - 1) < 0."""
    buffers = ("var", "batches")
    start = {"w": vector(0), "var": vector(1.0), "batches": np.array(100, np.int64)}
    driver = Driver(
        rules_of(rounds=Buffered(size=2, max_staleness=9), optimizer=Sgd(0.5)), snapshot_of(start, buffers=buffers)
    )

    for seq in range(4):
        tensors = {"w": vector(1), "var": vector(0.1), "batches": np.array(5, np.int64)}
        driver.update(update_of(tensors, seq=seq, base_version=0, buffers=buffers))

    assert driver.machine.version == 2
    assert driver.parameters["var"][0] == pytest.approx(0.1)
    assert driver.parameters["batches"] == 110
    assert driver.parameters["batches"].dtype == np.int64


def test_defaults_of_the_server_learning_rate() -> None:
    assert AggregatorConfig().effective_learning_rate == 1.0
    assert AggregatorConfig(mode=Mode.GRADIENT).effective_learning_rate == 0.1
    assert AggregatorConfig(optimizer="adam").effective_learning_rate == 0.01
    assert AggregatorConfig(learning_rate=0.3).effective_learning_rate == 0.3
