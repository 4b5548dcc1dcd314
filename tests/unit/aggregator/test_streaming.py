"""A strategy folds updates one by one; what comes out is what all of them at once would give."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from aggregator.config import AggregatorConfig
from aggregator.strategies import STRATEGIES, Strategy
from aggregator.strategies.base import begin, resume
from aggregator.strategies.rows import MemorySpool
from broker.messages import Array, Update
from tests.support.builders import spec_of, update_of

NUMBERS = np.random.default_rng(7)
UPDATES = [
    update_of(
        {"a": NUMBERS.standard_normal((3, 4)).astype(np.float32), "b": NUMBERS.standard_normal(5).astype(np.float32)},
        worker=f"w{number}",
        examples=3 + number,
        effort=1.0 + number,
    )
    for number in range(7)
]
MODEL = spec_of(UPDATES[0].tensors)  # type: ignore[arg-type]


def strategy_of(name: str, weighting: str = "uniform") -> Strategy:
    settings = {"strategy": name, "weighting": weighting, "staleness": "polynomial", "buffer_size": 7}
    return AggregatorConfig.model_validate(settings).rules().strategy


def aggregate(strategy: Strategy, updates: Sequence[Update], *, saved: bool) -> dict[str, Array]:
    """``saved``: a checkpoint copies the accumulator after each update, and the next one goes on with the copy."""
    spool = MemorySpool()
    accumulator = begin(strategy, MODEL, spool)
    for number, update in enumerate(updates):
        strategy.fold(accumulator, update, number % 3)
        if saved:
            accumulator = resume(accumulator.lend().copy(), spool)
    return strategy.finish(accumulator, MODEL)


@pytest.mark.parametrize("name", STRATEGIES.own)
def test_a_checkpoint_after_each_update_changes_no_bit(name: str) -> None:
    at_once = aggregate(strategy_of(name), UPDATES, saved=False)
    in_steps = aggregate(strategy_of(name), UPDATES, saved=True)

    assert at_once.keys() == {"a", "b"}
    for tensor, array in at_once.items():
        assert array.tobytes() == in_steps[tensor].tobytes()


@pytest.mark.parametrize("weighting", ["examples", "uniform"])
def test_the_streamed_mean_is_the_mean_of_all(weighting: str) -> None:
    result = aggregate(strategy_of("mean", weighting), UPDATES, saved=False)

    shares = np.array([update.examples if weighting == "examples" else 1 for update in UPDATES])
    weights = shares * (1.0 + np.arange(7) % 3) ** -0.5
    for tensor, array in result.items():
        rows = np.stack([np.asarray(update.tensors[tensor], np.float64) for update in UPDATES])
        expected = np.tensordot(weights, rows, 1) / shares.sum()
        np.testing.assert_allclose(array, expected, rtol=1e-5, atol=1e-6)
