"""Server optimisers: from the parameters and a descent direction to the next parameters.

Pairs of pure functions on dictionaries of arrays. ``direction`` is what gradient descent would subtract: the
mean gradient in gradient mode, minus the mean delta in delta mode (Reddi et al. 2021, arXiv 2003.00295,
algorithm 2, where minus delta is called the pseudo-gradient). State and arithmetic are kept in the
accumulator's dtypes; the result has the parameters' dtypes. Nothing is written in place, since a checkpoint of
the previous version may still be on its way to the disk.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from broker.messages import Array, Tensors

__all__ = ["OPTIMIZERS", "Adam", "Optimizer", "OptimizerState", "Sgd"]

#: Slots (``momentum``, ``first``, ``second``) by tensor name, and the number of steps made.
Slots = Mapping[str, Tensors]


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What an optimiser remembers; part of every checkpoint."""

    slots: Slots
    step: int = 0


class Optimizer(Protocol):
    """A server optimiser."""

    def init(self) -> OptimizerState:
        """The state before the first step."""

    def apply(
        self, parameters: Tensors, direction: Tensors, state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """The next parameters and state, for the tensors that stand in ``direction``."""


@dataclass(frozen=True, slots=True)
class Sgd:
    """Gradient descent with momentum, as torch.optim.SGD: ``m = momentum * m + d``, ``p = p - rate * m``.

    In delta mode a learning rate of 1 without momentum is plain federated averaging.
    """

    learning_rate: float
    momentum: float = 0.0

    def init(self) -> OptimizerState:
        """No momentum yet."""
        return OptimizerState({"momentum": {}} if self.momentum else {})

    def apply(
        self, parameters: Tensors, direction: Tensors, state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """One step."""
        velocity = direction
        if self.momentum:
            before = state.slots["momentum"]
            velocity = {
                n: np.asarray(d + self.momentum * before[n]) if n in before else d for n, d in direction.items()
            }
        result = {n: _minus(parameters[n], self.learning_rate, v) for n, v in velocity.items()}
        return result, OptimizerState({"momentum": velocity} if self.momentum else {}, state.step + 1)


@dataclass(frozen=True, slots=True)
class Adam:
    """Adam (Kingma & Ba 2015) with bias correction, as torch.optim.Adam; FedAdam on deltas.

    Reddi et al. leave the bias correction out and use ``tau`` = 1e-3 where we have ``epsilon``: set it so for
    their variant's behaviour after the first rounds.
    """

    learning_rate: float
    beta1: float = 0.9
    beta2: float = 0.999
    epsilon: float = 1e-8

    def init(self) -> OptimizerState:
        """No moments yet."""
        return OptimizerState({"first": {}, "second": {}})

    def apply(
        self, parameters: Tensors, direction: Tensors, state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """One step."""
        step = state.step + 1
        first, second, result = {}, {}, {}
        for name, d in direction.items():
            m = np.asarray((1 - self.beta1) * d)
            v = np.asarray((1 - self.beta2) * np.square(d))
            if name in state.slots["first"]:
                m += self.beta1 * state.slots["first"][name]
                v += self.beta2 * state.slots["second"][name]
            denominator = np.sqrt(v / (1 - self.beta2**step)) + self.epsilon
            result[name] = _minus(parameters[name], self.learning_rate / (1 - self.beta1**step), m / denominator)
            first[name], second[name] = m, v
        return result, OptimizerState({"first": first, "second": second}, step)


def _minus(parameter: Array, rate: float, step: Array) -> Array:
    """``parameter - rate * step`` in the step's dtype, returned in the parameter's."""
    moved = np.asarray(np.multiply(step, rate))
    np.subtract(parameter, moved, out=moved, dtype=moved.dtype, casting="unsafe")
    return moved.astype(parameter.dtype, copy=False)


#: Name in the configuration, and what makes the optimiser from (learning rate, momentum).
OPTIMIZERS: Mapping[str, Callable[[float, float], Optimizer]] = {
    "sgd": Sgd,
    "adam": lambda rate, beta1: Adam(rate, beta1=beta1 or 0.9),
}
