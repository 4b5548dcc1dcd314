"""AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101): Adam whose weight decay stays out of the moments."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.optimizers.base import OptimizerState, blocks, minus
from aggregator.optimizers.moments import Moments
from broker.messages import Array, Tensors

__all__ = ["AdamW"]


@dataclass(frozen=True, slots=True)
class AdamW(Moments):
    """As torch.optim.AdamW: ``p = p - rate * (mean / (sqrt(square) + epsilon) + decay * p)``."""

    def apply(
        self, parameters: Tensors, direction: dict[str, Array], state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """One step."""
        step = state.step + 1
        unbias_m, unbias_v = 1 - self.beta1**step, 1 - self.beta2**step
        first: dict[str, Array] = {}
        second: dict[str, Array] = {}
        result: dict[str, Array] = {}
        for name in list(direction):
            parameter = parameters[name]
            first[name], second[name] = self.moments(name, direction.pop(name), state.slots)
            result[name] = np.empty(parameter.shape, parameter.dtype)
            for target, p, m, v in blocks(result[name], parameter, first[name], second[name]):
                denominator = np.sqrt(v / unbias_v) + self.epsilon
                move = np.divide(m / unbias_m, denominator, out=denominator)
                np.add(move, np.multiply(p, self.weight_decay, dtype=move.dtype, casting="unsafe"), out=move)
                minus(target, p, self.learning_rate, move)
        return result, OptimizerState({"first": first, "second": second}, step)
