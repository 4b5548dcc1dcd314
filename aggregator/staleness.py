"""How much an update counts that started from an old version. One function a line in the table.

Staleness counts versions of the server between the one that the worker started from and the one that the update
meets, so a fresh update has staleness 0 and weight 1. An update whose weight is 0 is not folded: it is rejected as too
stale, so that its worker knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from aggregator.recipe import Recipe
from broker.errors import StrategyError
from broker.parts import Parts, made

__all__ = [
    "STALENESSES",
    "Weight",
    "checked",
    "constant",
    "cutoff",
    "exponential",
    "hinge",
    "polynomial",
    "times",
    "weight_of",
]

Weight = Callable[[int], float]


def constant() -> Weight:
    """Weight 1 whatever the staleness."""
    return lambda _staleness: 1.0


def polynomial(exponent: float) -> Weight:
    """``(1 + staleness) ** -exponent``: FedBuff (arXiv 2106.06639, section 5) with exponent 0.5.

    It is FedAsync's (arXiv 1903.03934) polynomial weight, too.
    """
    return lambda staleness: float((1 + staleness) ** -exponent)


def hinge(slope: float, threshold: int) -> Weight:
    """1 up to ``threshold``, then ``1 / (slope * (staleness - threshold) + 1)``: FedAsync's hinge.

    arXiv 1903.03934, where a is the slope and b the threshold; in its experiments a = 10 and b = 4.
    """
    return lambda staleness: 1.0 if staleness <= threshold else 1.0 / (slope * (staleness - threshold) + 1.0)


def exponential(decay: float) -> Weight:
    """``exp(-decay * staleness)``.

    Chen et al. 2019 (arXiv 1903.07424) have (e / 2) ** -staleness, which is a decay of 1 - ln 2 = 0.307.
    """
    return lambda staleness: math.exp(-decay * staleness)


def cutoff(threshold: int) -> Weight:
    """1 up to ``threshold``, 0 beyond."""
    return lambda staleness: 1.0 if staleness <= threshold else 0.0


#: Name in the configuration, and what makes the weight from a recipe.
STALENESSES: Parts[Callable[[Recipe], Weight]] = Parts(
    "staleness",
    "fedmq.stalenesses",
    {
        "constant": lambda _: constant(),
        "polynomial": lambda recipe: polynomial(recipe.staleness_exponent),
        "hinge": lambda recipe: hinge(recipe.staleness_slope, recipe.staleness_threshold),
        "exponential": lambda recipe: exponential(recipe.staleness_decay),
        "cutoff": lambda recipe: cutoff(recipe.staleness_threshold),
    },
)


def weight_of(recipe: Recipe) -> Weight:
    """The weight that ``recipe`` names. Raises :class:`ConfigError`."""
    return checked(made(STALENESSES, recipe.staleness, recipe))


def times(weight: Weight, factor: float) -> Weight:
    """``factor * weight``."""
    return lambda staleness: factor * weight(staleness)


def checked(weight: Weight) -> Weight:
    """``weight``, which may be of another package; it raises :class:`StrategyError` where it gives no weight."""

    def check(staleness: int) -> float:
        value = weight(staleness)
        if not 0 <= value < math.inf:
            raise StrategyError(
                f"aggregator.staleness gave {value!r} for a staleness of {staleness}; a weight is finite, ≥ 0"
            )
        return float(value)

    return check
