"""Strategies and optimisers of others that do not what one does: told by name, and nothing is committed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from aggregator.optimizers import Sgd
from aggregator.staleness import constant
from aggregator.strategies import Accumulator, Mean
from broker.errors import StrategyBroken, StrategyError
from broker.messages import Array, ModelSpec, Update
from tests.support.builders import rules_of, snapshot_of, update_of, vector
from tests.unit.aggregator.driver import Driver


class Foreign(Mean):
    """A strategy whose result is ``change``d."""

    change: Any

    def finish(self, accumulator: Accumulator, model: ModelSpec) -> dict[str, Array]:
        return self.change(super().finish(accumulator, model))  # type: ignore[no-any-return]


def foreign(change: Any) -> Foreign:
    kind: type[Foreign] = type("Foreign", (Foreign,), {"change": staticmethod(change)})
    return kind("uniform", constant())


def both(driver: Driver) -> None:
    """The two updates of a round."""
    for seq in range(2):
        driver.update(update_of({"w": vector(1, 1)}, seq=seq))


@dataclass(frozen=True)
class Lazy(Sgd):
    """An optimiser that leaves tensors out."""

    def apply(self, parameters: Any, direction: Any, state: Any) -> Any:
        return {}, state


@dataclass(frozen=True)
class Raising(Sgd):
    def apply(self, parameters: Any, direction: Any, state: Any) -> Any:
        raise ZeroDivisionError("division by zero")


class Clumsy(Mean):
    def fold(self, accumulator: Accumulator, update: Update, staleness: int) -> float:
        raise IndexError("out of range")


@pytest.mark.parametrize(
    ("parts", "complaint"),
    [
        ({"strategy": foreign(lambda a: {"w": np.zeros((3, 1))})}, "Foreign gave other tensors than the model's: w"),
        ({"strategy": foreign(lambda a: {})}, "Foreign gave other tensors than the model's: w"),
        ({"strategy": foreign(lambda a: a | {"x": a["w"]})}, "Foreign gave other tensors than the model's: x"),
        ({"strategy": foreign(lambda a: {"w": [1.0, 2.0]})}, "Foreign gave other tensors than the model's: w"),
        ({"strategy": foreign(lambda a: a["w"])}, "Foreign gave a ndarray, no dictionary of tensors"),
        ({"strategy": foreign(lambda a: a["v"])}, "Foreign raised KeyError: 'v'; no version was made, no update lost"),
        ({"strategy": Clumsy("uniform", constant())}, "test_foreign_parts.Clumsy raised IndexError: out of range"),
        ({"optimizer": Lazy(1.0)}, "test_foreign_parts.Lazy gave no next w"),
        ({"optimizer": Raising(1.0)}, "test_foreign_parts.Raising raised ZeroDivisionError: division by zero"),
    ],
)
def test_it_is_named_and_no_version_is_made(parts: dict[str, Any], complaint: str) -> None:
    driver = Driver(rules_of(**parts), snapshot_of({"w": vector(1, 2)}))

    with pytest.raises(StrategyBroken, match=complaint):
        both(driver)

    assert driver.disk.version == driver.machine.version == 0
    assert driver.acked == []
    assert driver.parameters["w"].tolist() == [1, 2]


def test_what_is_not_finite_leaves_its_round_out() -> None:
    rules = rules_of(strategy=foreign(lambda a: {"w": a["w"] * np.float32(np.inf)}))
    driver = Driver(rules, snapshot_of({"w": vector(1, 2)}))
    both(driver)

    assert driver.machine.version == 1
    assert len(driver.records[0].dropped) == 2


def test_a_round_that_a_strategy_refuses_is_left_out_too() -> None:
    def refuse(aggregate: Any) -> Any:
        raise StrategyError("too few updates")

    driver = Driver(rules_of(strategy=foreign(refuse)), snapshot_of({"w": vector(1, 2)}))
    both(driver)

    assert driver.machine.version == 1
