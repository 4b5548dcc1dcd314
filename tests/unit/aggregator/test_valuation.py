"""Shapley values against games whose values are known."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from aggregator.valuation import METHODS, MOST_EXACT, Utility, exact_shapley, gtg_shapley, leave_one_out

WORKERS = ("a", "b", "c", "d", "e")


def game(seed: int = 0) -> Utility:
    """Diminishing returns: what a worker adds depends on who is there."""
    points = np.random.default_rng(seed).normal(0.5, 1.0, (len(WORKERS), 4))

    def utility(coalition: frozenset[str]) -> float:
        if not coalition:
            return -10.0
        mean = points[[WORKERS.index(worker) for worker in coalition]].mean(axis=0)
        return -float(((mean - 1.0) ** 2).sum())

    return utility


def by_orders(workers: tuple[str, ...], utility: Utility) -> dict[str, float]:
    """Shapley values from their definition."""
    totals = dict.fromkeys(workers, 0.0)
    orders = list(permutations(workers))
    for order in orders:
        for index, worker in enumerate(order):
            totals[worker] += utility(frozenset(order[: index + 1])) - utility(frozenset(order[:index]))
    return {worker: total / len(orders) for worker, total in totals.items()}


def test_exact_values_are_those_of_the_definition_and_add_up() -> None:
    values = exact_shapley(WORKERS, game())

    assert values == pytest.approx(by_orders(WORKERS, game()))
    assert sum(values.values()) == pytest.approx(game()(frozenset(WORKERS)) - game()(frozenset()))


def test_the_glove_game() -> None:
    """a has a left glove, b and c a right one each; a pair is worth 1: 2/3, 1/6, 1/6."""
    values = exact_shapley("abc", lambda who: float("a" in who and len(who) > 1))

    assert values == pytest.approx({"a": 2 / 3, "b": 1 / 6, "c": 1 / 6})


@pytest.mark.parametrize("seed", range(5))
def test_monte_carlo_comes_near_the_exact_values(seed: int) -> None:
    exact = exact_shapley(WORKERS, game(seed))

    found = gtg_shapley(WORKERS, game(seed), seed=seed)

    pair = np.array([[exact[worker], found[worker]] for worker in WORKERS]).T
    assert np.corrcoef(pair)[0, 1] >= 0.99
    assert found == gtg_shapley(WORKERS, game(seed), seed=seed)


def test_every_coalition_is_asked_for_once() -> None:
    asked: list[frozenset[str]] = []

    def utility(coalition: frozenset[str]) -> float:
        asked.append(coalition)
        return game()(coalition)

    for method in METHODS.values():
        asked.clear()
        method(WORKERS, utility)
        assert len(asked) == len(set(asked))


def test_a_round_that_changes_nothing_is_worth_nothing_and_costs_two_utilities() -> None:
    asked: list[frozenset[str]] = []

    def utility(coalition: frozenset[str]) -> float:
        asked.append(coalition)
        return 3.0

    assert gtg_shapley(WORKERS, utility) == dict.fromkeys(WORKERS, 0.0)
    assert len(asked) == 2


def test_who_comes_when_all_is_gained_already_is_not_asked_for() -> None:
    asked: set[frozenset[str]] = set()

    def utility(coalition: frozenset[str]) -> float:
        asked.add(coalition)
        return float(bool(coalition))

    values = gtg_shapley(WORKERS, utility)

    assert values == pytest.approx(dict.fromkeys(WORKERS, 0.2))
    assert max(map(len, asked - {frozenset(WORKERS)})) == 1


def test_leaving_one_out() -> None:
    utility = game()
    everybody = frozenset(WORKERS)

    assert leave_one_out(WORKERS, utility) == {w: utility(everybody) - utility(everybody - {w}) for w in WORKERS}


def test_too_many_for_exact_values_are_refused() -> None:
    with pytest.raises(ValueError, match="8,192 models"):
        exact_shapley([f"w{i}" for i in range(MOST_EXACT + 1)], len)


@pytest.mark.parametrize("method", METHODS.values())
def test_one_worker_has_it_all(method: object) -> None:
    assert callable(method)
    assert method(["a"], lambda who: 2.0 * len(who)) == {"a": 2.0}
