"""Adagrad (Duchi et al. 2011) in the form of FedAdagrad (Reddi et al. 2021, arXiv 2003.00295, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.optimizers.base import OptimizerState, Rated, add_decay, blocks, minus
from aggregator.recipe import Recipe
from broker.messages import Array, Tensors

__all__ = ["Adagrad"]


@dataclass(frozen=True, slots=True)
class Adagrad(Rated):
    """``s = s + d^2``, ``p = p - rate * d / (sqrt(s) + epsilon)``; weight decay is a part of the gradient.

    As torch.optim.Adagrad with the square of ``epsilon`` for the sum to begin with, which is Reddi et al.'s ``tau``;
    without their first moment, as in their experiments.
    """

    epsilon: float = 1e-3
    weight_decay: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> Adagrad:
        """As ``recipe`` says."""
        return cls(recipe.learning_rate, 1e-3 if recipe.epsilon is None else recipe.epsilon, recipe.weight_decay)

    def init(self) -> OptimizerState:
        """No sum yet."""
        return OptimizerState({"sum": {}})

    def apply(
        self, parameters: Tensors, direction: dict[str, Array], state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """One step; the sum takes ``direction``'s memory."""
        before = state.slots["sum"]
        sums: dict[str, Array] = {}
        result: dict[str, Array] = {}
        for name in list(direction):
            parameter, d = parameters[name], direction.pop(name)
            add_decay(d, parameter, self.weight_decay)
            sums[name] = d
            result[name] = np.empty(parameter.shape, parameter.dtype)
            old = [before[name]] if name in before else []
            for target, p, s, *m in blocks(result[name], parameter, d, *old):
                move = s.copy()
                np.square(s, out=s)
                np.add(s, m[0] if m else self.epsilon**2, out=s)
                denominator = np.sqrt(s) + self.epsilon
                minus(target, p, self.learning_rate, np.divide(move, denominator, out=denominator))
        return result, OptimizerState({"sum": sums}, state.step + 1)
