"""Adam (Kingma & Ba 2015, arXiv 1412.6980); on deltas, FedAdam."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.optimizers.base import OptimizerState, add_decay, blocks, minus
from aggregator.optimizers.moments import Moments
from broker.messages import Array, Tensors

__all__ = ["Adam"]


@dataclass(frozen=True, slots=True)
class Adam(Moments):
    """With bias correction, as torch.optim.Adam; weight decay is a part of the gradient.

    Reddi et al. leave the bias correction out and use ``tau`` = 1e-3 where we have ``epsilon``: set it so for
    their variant's behaviour after the first rounds.
    """

    def apply(
        self, parameters: Tensors, direction: dict[str, Array], state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """One step."""
        step = state.step + 1
        rate, unbias = self.learning_rate / (1 - self.beta1**step), 1 - self.beta2**step
        first: dict[str, Array] = {}
        second: dict[str, Array] = {}
        result: dict[str, Array] = {}
        for name in list(direction):
            parameter, d = parameters[name], direction.pop(name)
            add_decay(d, parameter, self.weight_decay)
            first[name], second[name] = self.moments(name, d, state.slots)
            result[name] = np.empty(parameter.shape, parameter.dtype)
            for target, p, m, v in blocks(result[name], parameter, first[name], second[name]):
                denominator = np.sqrt(v / unbias) + self.epsilon
                minus(target, p, rate, np.divide(m, denominator, out=denominator))
        return result, OptimizerState({"first": first, "second": second}, step)
