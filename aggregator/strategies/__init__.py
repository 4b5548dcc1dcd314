"""Strategies: one file each, one line in the table."""

from collections.abc import Callable

from aggregator.recipe import Recipe
from aggregator.staleness import weight_of
from aggregator.strategies.base import Accumulator, Strategy
from aggregator.strategies.fednova import FedNova
from aggregator.strategies.gather import Gather
from aggregator.strategies.mean import Mean
from aggregator.strategies.rules import RULES, Rule, RuleSettings
from broker.parts import Parts, made

__all__ = ["STRATEGIES", "Accumulator", "FedNova", "Gather", "Mean", "Strategy", "strategy_of"]


def _over(rule: Callable[[RuleSettings], Rule]) -> Callable[[Recipe], Strategy]:
    """The strategy of a rule over all updates of a round."""
    return lambda recipe: Gather(rule(RuleSettings()), weight_of(recipe))


#: Name in the configuration, and what makes the strategy from a recipe.
STRATEGIES: Parts[Callable[[Recipe], Strategy]] = Parts(
    "strategy",
    "fedmq.strategies",
    {
        "mean": Mean.of,
        "fednova": FedNova.of,
        "median": _over(RULES["median"]),
    },
)


def strategy_of(recipe: Recipe) -> Strategy:
    """The strategy that ``recipe`` names. Raises :class:`ConfigError`."""
    return made(STRATEGIES, recipe.strategy, recipe)
