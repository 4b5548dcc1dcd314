"""Yogi (Zaheer et al. 2018) in the form of FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.optimizers.base import OptimizerState, add_decay, blocks, minus
from aggregator.optimizers.moments import Adaptive
from broker.messages import Array, Tensors

__all__ = ["Yogi"]


@dataclass(frozen=True, slots=True)
class Yogi(Adaptive):
    """``v = v - (1 - beta2) * sign(v - d^2) * d^2``: a second moment that grows and falls by no more than ``d^2``.

    ``m = beta1 * m + (1 - beta1) * d``, ``p = p - rate * m / (sqrt(v) + epsilon)``, without bias correction, as
    Reddi et al. have it; their ``tau`` is ``epsilon``, and v begins as its square. Weight decay, which they do not
    have, is a part of the gradient.
    """

    beta2: float = 0.99
    epsilon: float = 1e-3

    def init(self) -> OptimizerState:
        """No moments yet. The second is none of Adam's, so it has a name of its own."""
        return OptimizerState({"first": {}, "yogi": {}})

    def apply(
        self, parameters: Tensors, direction: dict[str, Array], state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """One step."""
        first: dict[str, Array] = {}
        second: dict[str, Array] = {}
        result: dict[str, Array] = {}
        for name in list(direction):
            parameter, d = parameters[name], direction.pop(name)
            add_decay(d, parameter, self.weight_decay)
            first[name], second[name] = d, np.empty_like(d)
            result[name] = np.empty(parameter.shape, parameter.dtype)
            old = [state.slots["first"][name], state.slots["yogi"][name]] if name in state.slots["first"] else []
            for target, p, m, v, *before in blocks(result[name], parameter, d, second[name], *old):
                square = np.square(m)
                old_v = before[1] if before else np.full_like(m, self.epsilon**2)
                np.multiply(np.sign(old_v - square), square, out=square)
                np.subtract(old_v, np.multiply(1 - self.beta2, square, out=square), out=v)
                np.multiply(1 - self.beta1, m, out=m)
                if before:
                    np.add(m, self.beta1 * before[0], out=m)
                denominator = np.sqrt(v) + self.epsilon
                minus(target, p, self.learning_rate, np.divide(m, denominator, out=denominator))
        return result, OptimizerState({"first": first, "yogi": second}, state.step + 1)
