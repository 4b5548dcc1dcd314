"""Running means of the direction and of its square, which Adam and its kin step by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from aggregator.optimizers.base import OptimizerState, Rated, Slots, blocks
from aggregator.recipe import Recipe
from broker.messages import Array

__all__ = ["Adaptive", "Moments"]


@dataclass(frozen=True, slots=True)
class Adaptive(Rated):
    """Base of those with two moments: what there is to set, by default as in torch's Adam."""

    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8
    weight_decay: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> Self:
        """As ``recipe`` says; what it leaves open is the class's own default."""
        made = cls(recipe.learning_rate, weight_decay=recipe.weight_decay)
        given = {"beta1": recipe.beta1(made.beta1), "beta2": recipe.beta2, "epsilon": recipe.epsilon}
        return replace(made, **{name: value for name, value in given.items() if value is not None})


@dataclass(frozen=True, slots=True)
class Moments(Adaptive):
    """Base of Adam, AdamW and LAMB: the moments of Kingma & Ba 2015 (arXiv 1412.6980), algorithm 1."""

    def init(self) -> OptimizerState:
        """No moments yet."""
        return OptimizerState({"first": {}, "second": {}})

    def moments(self, name: str, direction: Array, slots: Slots) -> tuple[Array, Array]:
        """The new moments of a tensor; the first takes ``direction``'s memory."""
        second = np.empty_like(direction)
        for m, v in blocks(direction, second):
            np.multiply(1 - self.beta2, np.square(m), out=v)
            np.multiply(1 - self.beta1, m, out=m)
        if name in slots["first"]:
            for m, v, old_m, old_v in blocks(direction, second, slots["first"][name], slots["second"][name]):
                np.add(m, self.beta1 * old_m, out=m)
                np.add(v, self.beta2 * old_v, out=v)
        return direction, second
