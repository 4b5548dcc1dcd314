"""Strategies: one file each, one line in the table."""

from collections.abc import Callable

from aggregator.recipe import Recipe
from aggregator.strategies.base import Accumulator, Strategy
from aggregator.strategies.fednova import FedNova
from aggregator.strategies.mean import Mean
from broker.parts import Parts, made

__all__ = ["STRATEGIES", "Accumulator", "FedNova", "Mean", "Strategy", "strategy_of"]

#: Name in the configuration, and what makes the strategy from a recipe.
STRATEGIES: Parts[Callable[[Recipe], Strategy]] = Parts(
    "strategy",
    "fedmq.strategies",
    {
        "mean": Mean.of,
        "fednova": FedNova.of,
    },
)


def strategy_of(recipe: Recipe) -> Strategy:
    """The strategy that ``recipe`` names. Raises :class:`ConfigError`."""
    return made(STRATEGIES, recipe.strategy, recipe)
