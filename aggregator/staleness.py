"""How much an update counts that started from an old version. One function a line in the table."""

from __future__ import annotations

from collections.abc import Callable

from aggregator.recipe import Recipe
from broker.parts import Parts, made

__all__ = ["STALENESSES", "constant", "polynomial", "weight_of"]

Weight = Callable[[int], float]


def constant() -> Weight:
    """Weight 1 whatever the staleness."""
    return lambda _staleness: 1.0


def polynomial(exponent: float) -> Weight:
    """``(1 + staleness) ** -exponent``: FedBuff (arXiv 2106.06639, section 5) with exponent 0.5.

    Staleness counts versions of the server between the one that the worker started from and the one that the
    update meets, so a fresh update has staleness 0 and weight 1.
    """
    return lambda staleness: float((1 + staleness) ** -exponent)


#: Name in the configuration, and what makes the weight from a recipe.
STALENESSES: Parts[Callable[[Recipe], Weight]] = Parts(
    "staleness",
    "fedmq.stalenesses",
    {
        "constant": lambda _: constant(),
        "polynomial": lambda recipe: polynomial(recipe.staleness_exponent),
    },
)


def weight_of(recipe: Recipe) -> Weight:
    """The weight that ``recipe`` names. Raises :class:`ConfigError`."""
    return made(STALENESSES, recipe.staleness, recipe)
