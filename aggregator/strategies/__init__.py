"""Strategies: one file each, one line in the table."""

from collections.abc import Callable

from aggregator.optimizers import Optimizer, optimizer_of
from aggregator.optimizers.remembering import Remembering
from aggregator.recipe import Recipe
from aggregator.staleness import weight_of
from aggregator.strategies.base import Accumulator, Strategy
from aggregator.strategies.fednova import FedNova
from aggregator.strategies.gather import Gather
from aggregator.strategies.mean import Mean
from aggregator.strategies.rules import RULES, Chain, Rule, RuleSettings, pre_aggregations_of
from broker.parts import Parts, made

__all__ = ["STRATEGIES", "Accumulator", "FedNova", "Gather", "Mean", "Strategy", "stepping", "strategy_of"]


def _over(rule: Callable[[RuleSettings], Rule]) -> Callable[[Recipe], Strategy]:
    """The strategy of a rule over all updates of a round, behind what the recipe has go before it."""

    def make(recipe: Recipe) -> Strategy:
        settings = RuleSettings(recipe.byzantine, recipe.clip_radius, recipe.clip_iterations)
        before = pre_aggregations_of(recipe.pre_aggregation, settings)
        return Gather(Chain(before, rule(settings)) if before else rule(settings), weight_of(recipe))

    return make


#: Name in the configuration, and what makes the strategy from a recipe.
STRATEGIES: Parts[Callable[[Recipe], Strategy]] = Parts(
    "strategy",
    "fedmq.strategies",
    {
        "mean": Mean.of,
        "fednova": FedNova.of,
        **{name: _over(rule) for name, rule in RULES.items()},
    },
)


def strategy_of(recipe: Recipe) -> Strategy:
    """The strategy that ``recipe`` names. Raises :class:`ConfigError`."""
    return made(STRATEGIES, recipe.strategy, recipe)


def stepping(recipe: Recipe) -> Optimizer:
    """The optimiser that ``recipe`` names, which keeps the last aggregate if the strategy's rule begins with it.

    Raises :class:`ConfigError`.
    """
    strategy, optimizer = strategy_of(recipe), optimizer_of(recipe)
    return Remembering(optimizer) if isinstance(strategy, Gather) and strategy.rule.remembers else optimizer
