"""Shapley's value on games whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import permutations

import numpy as np
import pytest

from aggregator.shapley import MOST_EXACT, Coalition, Truncation, exact, guided

WORTH = {"a": 3.0, "b": -1.0, "c": 0.0, "d": 0.5}


def additive(coalition: Coalition) -> float:
    return 10 + sum(WORTH[player] for player in coalition)


def gloves(coalition: Coalition) -> float:
    """One left glove, two right ones; a pair is worth 1. The textbook's values are 2/3, 1/6, 1/6."""
    return float("left" in coalition and len(coalition) > 1)


def airport(costs: dict[str, float]) -> Callable[[Coalition], float]:
    """The longest runway that somebody needs (Littlechild & Owen 1973): each part is shared by those who need it."""
    return lambda coalition: max((costs[player] for player in coalition), default=0.0)


def source(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@pytest.mark.parametrize("value", [exact, lambda players, game: guided(players, game, source())])
def test_games_of_the_textbooks(value: Callable[..., dict[str, float]]) -> None:
    assert value(list(WORTH), additive) == pytest.approx(WORTH, abs=0.06)
    assert value(["left", "r1", "r2"], gloves) == pytest.approx({"left": 2 / 3, "r1": 1 / 6, "r2": 1 / 6}, abs=0.06)
    costs = {"small": 1.0, "middle": 3.0, "large": 6.0}
    expected = {"small": 1 / 3, "middle": 1 / 3 + 2 / 2, "large": 1 / 3 + 2 / 2 + 3}
    assert value(list(costs), airport(costs)) == pytest.approx(expected, abs=0.15)


def test_exactly_is_the_mean_over_all_orders() -> None:
    random = source(5)
    players = list("vwxyz")
    worth: dict[Coalition, float] = {}

    def game(coalition: Coalition) -> float:
        return worth.setdefault(coalition, float(random.normal()))

    found = exact(players, game)

    sums = dict.fromkeys(players, 0.0)
    orders = list(permutations(players))
    for order in orders:
        for index, player in enumerate(order):
            sums[player] += game(frozenset(order[: index + 1])) - game(frozenset(order[:index]))
    assert found == pytest.approx({player: total / len(orders) for player, total in sums.items()}, abs=1e-12)
    assert sum(found.values()) == pytest.approx(game(frozenset(players)) - game(frozenset()), abs=1e-12)


def test_exactly_refuses_what_would_take_for_ever() -> None:
    with pytest.raises(ValueError, match=r"13 players have 8,192 coalitions"):
        exact([str(number) for number in range(MOST_EXACT + 1)], len)


def test_a_round_that_gained_nothing_is_not_played() -> None:
    asked: list[Coalition] = []

    def game(coalition: Coalition) -> float:
        asked.append(coalition)
        return -2.0 - 1e-5 * len(coalition) % 2e-5

    assert guided(["a", "b"], game, source()) == {"a": 0.0, "b": 0.0}
    assert asked == [frozenset(), frozenset("ab")]
    assert guided([], game, source()) == {}


def test_truncation_saves_evaluations_and_little_is_lost() -> None:
    """Twenty players of whom five do nearly all, whoever of them comes: 2**20 coalitions."""
    players = [f"p{number:02}" for number in range(20)]
    worth = {player: 1.0 if number < 5 else 0.001 for number, player in enumerate(players)}
    asked: set[Coalition] = set()

    def game(coalition: Coalition) -> float:
        asked.add(coalition)
        return float(np.tanh(sum(worth[player] for player in coalition)))

    found = guided(players, game, source())
    cut = len(asked)
    asked.clear()
    whole = guided(players, game, source(), Truncation(within=0.0, settled=0.001))

    assert cut < len(asked) / 2
    assert np.corrcoef([found[p] for p in players], [whole[p] for p in players])[0, 1] > 0.98
    assert sum(whole.values()) == pytest.approx(game(frozenset(players)))


def test_the_same_seed_gives_the_same_values_and_another_one_others() -> None:
    costs = {str(number): float(number**2) for number in range(6)}
    one, same, other = (guided(list(costs), airport(costs), source(seed)) for seed in (1, 1, 2))

    assert one == same
    assert one != other


def test_no_coalition_is_evaluated_twice() -> None:
    asked: list[Coalition] = []

    def game(coalition: Coalition) -> float:
        asked.append(coalition)
        return additive(coalition)

    guided(list(WORTH), game, source())

    assert len(asked) == len(set(asked)) <= 2 ** len(WORTH)


def test_who_comes_when_all_is_gained_already_is_not_asked_for() -> None:
    asked: set[Coalition] = set()

    def game(coalition: Coalition) -> float:
        asked.add(coalition)
        return float(bool(coalition))

    assert guided(list("abcde"), game, source()) == pytest.approx(dict.fromkeys("abcde", 0.2))
    assert max(map(len, asked - {frozenset("abcde")})) == 1


def test_one_player_has_it_all() -> None:
    assert exact(["a"], lambda who: 2.0 * len(who)) == guided(["a"], lambda who: 2.0 * len(who), source()) == {"a": 2.0}
