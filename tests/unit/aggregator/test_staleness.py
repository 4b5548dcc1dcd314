"""Weights of stale updates, by the papers' numbers, and what they do to a round."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from aggregator.config import AggregatorConfig
from aggregator.core.rounds import Buffered
from aggregator.optimizers import Sgd
from aggregator.staleness import Weight, checked, constant, cutoff, exponential, hinge, polynomial, weight_of
from aggregator.strategies import Mean
from broker.errors import StrategyError
from broker.messages import Mode, Reason
from tests.support.builders import rules_of, snapshot_of, update_of, vector
from tests.unit.aggregator.driver import Driver


@pytest.mark.parametrize(
    ("weight", "values"),
    [
        (constant(), {0: 1, 1: 1, 1000: 1}),
        # FedBuff, and FedAsync's polynomial: 1 / sqrt(1 + staleness).
        (polynomial(0.5), {0: 1, 3: 0.5, 8: 1 / 3, 99: 0.1}),
        # FedAsync's hinge with the paper's a = 10, b = 4: 1 / (10 * (staleness - 4) + 1) beyond 4.
        (hinge(10, 4), {0: 1, 4: 1, 5: 1 / 11, 6: 1 / 21, 14: 1 / 101}),
        # Chen et al.: (e / 2) ** -staleness.
        (exponential(1 - math.log(2)), {0: 1, 1: 2 / math.e, 2: (2 / math.e) ** 2}),
        (cutoff(2), {0: 1, 2: 1, 3: 0}),
    ],
)
def test_the_papers_numbers(weight: Weight, values: dict[int, float]) -> None:
    assert {staleness: weight(staleness) for staleness in values} == pytest.approx(values, rel=1e-12)


def test_settings_reach_them() -> None:
    def weights(**settings: Any) -> list[float]:
        return [weight_of(AggregatorConfig(**settings).recipe())(staleness) for staleness in (0, 3, 8)]

    assert weights() == pytest.approx([1, 1 / 2, 1 / 3])
    assert weights(staleness="polynomial", staleness_exponent=1) == pytest.approx([1, 1 / 4, 1 / 9])
    assert weights(staleness="constant") == [1, 1, 1]
    assert weights(staleness="hinge") == pytest.approx([1, 1, 1 / 41])
    assert weights(staleness="hinge", staleness_slope=1, staleness_threshold=2) == pytest.approx([1, 1 / 2, 1 / 7])
    assert weights(staleness="exponential", staleness_decay=0.5) == pytest.approx([1, math.exp(-1.5), math.exp(-4)])
    assert weights(staleness="cutoff", staleness_threshold=3) == [1, 1, 0]


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_what_is_no_weight_is_told(value: float) -> None:
    with pytest.raises(StrategyError, match="staleness gave"):
        checked(lambda _: value)(3)


def test_an_update_without_weight_is_rejected_as_too_stale_and_its_worker_is_told() -> None:
    config = AggregatorConfig(buffer_size=1, staleness="cutoff", staleness_threshold=1)
    driver = Driver(config.rules(), snapshot_of({"w": vector(0)}))
    for seq in range(3):
        driver.update(update_of({"w": vector(1)}, seq=seq, base_version=seq))

    driver.update(update_of({"w": vector(1)}, worker="slow", base_version=2))
    driver.update(update_of({"w": vector(1)}, worker="slow", seq=1, base_version=2))

    assert driver.reasons == [Reason.TOO_STALE]
    assert driver.told[0].worker == "slow"
    assert driver.told[0].detail == "staleness 2, to which aggregator.staleness gives no weight"
    assert driver.machine.version == 4


def test_normalised_weights_leave_the_step_its_length() -> None:
    """A fresh update and one of staleness 3, whose weight is a half: by count (1 + 0.5 * 4) / 2, or by weights."""
    results = []
    for normalized in (False, True):
        strategy = Mean("uniform", polynomial(0.5), normalized)
        driver = Driver(
            rules_of(rounds=Buffered(size=1, max_staleness=9), strategy=strategy), snapshot_of({"w": vector(0)})
        )
        for seq in range(3):
            driver.update(update_of({"w": vector(0)}, seq=seq, base_version=seq))
        driver.machine.rules = rules_of(rounds=Buffered(size=2, max_staleness=9), strategy=strategy)

        driver.update(update_of({"w": vector(1)}, worker="fresh", base_version=3))
        driver.update(update_of({"w": vector(4)}, worker="stale", base_version=0))
        results.append(float(driver.parameters["w"][0]))

    assert results == [1.5, 2.0]
    assert AggregatorConfig(normalize_staleness=True).recipe().normalize_staleness


# ----------------------------------------------------------------------------------------------------- FedAsync


def fedasync(**settings: Any) -> Driver:
    config = AggregatorConfig(mode=Mode.PARAMETERS, buffer_size=1, **settings)
    return Driver(config.rules(), snapshot_of({"w": vector(10)}))


def send(driver: Driver, value: float, seq: int, base: int) -> float:
    driver.update(update_of({"w": vector(value)}, seq=seq, base_version=base, mode=Mode.PARAMETERS))
    return float(driver.parameters["w"][0])


def test_fedasync_mixes_by_alpha_and_staleness() -> None:
    """Xie et al. 2019, algorithm 1: x = (1 - alpha_t) x + alpha_t x_new, alpha_t = alpha s(t - tau); alpha is 0.6."""
    driver = fedasync()
    x = 10.0
    for seq, (value, base, staleness) in enumerate([(20.0, 0, 0), (0.0, 0, 1), (-8.0, 2, 0), (100.0, 0, 3)]):
        alpha = 0.6 * (1 + staleness) ** -0.5
        x = (1 - alpha) * x + alpha * value
        assert send(driver, value, seq, base) == pytest.approx(x, rel=1e-6)
    assert [record.updates[0].weight for record in driver.records] == pytest.approx([1, 2**-0.5, 1, 0.5])


def test_fedasync_with_alpha_one_takes_what_comes() -> None:
    assert send(fedasync(learning_rate=1.0), 20.0, 0, 0) == 20.0


def test_fedasync_with_the_hinge() -> None:
    driver = fedasync(staleness="hinge", staleness_threshold=0, staleness_slope=1.0)
    assert send(driver, 20.0, 0, 0) == pytest.approx(16.0)
    assert send(driver, 0.0, 1, 0) == pytest.approx(0.7 * 16)


def test_parameters_of_a_whole_buffer_are_averaged_and_pull_by_their_mean_weight() -> None:
    config = AggregatorConfig(mode=Mode.PARAMETERS, buffer_size=2, learning_rate=0.5)
    driver = Driver(config.rules(), snapshot_of({"w": vector(10)}))
    send(driver, 10, 0, 0)
    send(driver, 10, 1, 0)

    send(driver, 20, 2, 1)
    after = send(driver, 50, 3, 0)

    fresh, stale = 1.0, 2**-0.5
    mean, pull = (fresh * 20 + stale * 50) / (fresh + stale), (fresh + stale) / 2
    assert after == pytest.approx(10 + 0.5 * pull * (mean - 10), rel=1e-6)


def test_synchronous_rounds_of_parameters_are_fedavg() -> None:
    """McMahan et al. 2017, algorithm 1: the mean of the trained models by examples."""
    config = AggregatorConfig(mode=Mode.PARAMETERS, rounds="synchronous", learning_rate=1.0, minimum_updates=2)
    driver = Driver(config.rules(), snapshot_of({"w": vector(10, -1)}))
    driver.hello("a", "b")
    for worker, values, examples in (("a", (1, 2), 1), ("b", (5, 6), 3)):
        driver.update(update_of({"w": vector(*values)}, worker=worker, examples=examples, mode=Mode.PARAMETERS))

    np.testing.assert_allclose(driver.parameters["w"], [4, 5], rtol=1e-6)


def test_other_optimisers_step_towards_parameters_too() -> None:
    driver = fedasync(optimizer="sgd", momentum=0.5, learning_rate=0.5)
    assert send(driver, 20, 0, 0) == pytest.approx(15)
    # The momentum is half of the step before, and the direction now is 15 - 15.
    assert send(driver, 15, 1, 1) == pytest.approx(17.5)
    assert Sgd(0.5, 0.5) == driver.machine.rules.optimizer


def test_a_delta_is_no_parameters() -> None:
    driver = fedasync()
    driver.update(update_of({"w": vector(1)}))
    assert driver.reasons == [Reason.WRONG_MODE]


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"learning_rate": 1.5}, "at most 1"),
        ({"normalize_staleness": True}, "undoes it"),
        ({"update_codec": "topk:0.01"}, "parameters need all"),
    ],
)
def test_what_parameters_do_not_go_with_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AggregatorConfig(mode=Mode.PARAMETERS, **settings)
