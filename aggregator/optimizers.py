"""Server optimisers: from the parameters and a descent direction to the next parameters.

Pairs of pure functions on dictionaries of arrays. ``direction`` is what gradient descent would subtract: the
mean gradient in gradient mode, minus the mean delta in delta mode (Reddi et al. 2021, arXiv 2003.00295,
algorithm 2, where minus delta is called the pseudo-gradient). State and arithmetic are kept in the
accumulator's dtypes; the result has the parameters' dtypes.

Memory: a step goes tensor by tensor, in blocks, and ``direction`` is used up. Its arrays become the next parameters
or the optimiser's new state, so that a step allocates nothing for SGD, one model for momentum (the parameters) and
two for Adam (the parameters and the second moment), while the old state is still there. Parameters and state that
come in are never written into, since a checkpoint of the previous version may be on its way to the disk, and since a
step that is not finite is taken back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from broker.messages import Array, Tensors

__all__ = ["OPTIMIZERS", "Adam", "Optimizer", "OptimizerState", "Sgd"]

#: Elements that go through a step together: what it takes besides its results is a few blocks of 1 MiB.
BLOCK = 1 << 18

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
        self, parameters: Tensors, direction: dict[str, Array], state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """The next parameters and state, for the tensors that stand in ``direction``.

        ``direction`` is used up: it is empty afterwards, and its arrays, which are contiguous, may be written into
        and be part of the result. ``parameters`` and ``state`` stay as they are.
        """


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
        self, parameters: Tensors, direction: dict[str, Array], state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """One step."""
        before = state.slots.get("momentum", {})
        velocity: dict[str, Array] = {}
        result: dict[str, Array] = {}
        for name in list(direction):
            parameter, step = parameters[name], direction.pop(name)
            if self.momentum:
                velocity[name] = step
                if name in before:
                    for v, old in _blocks(step, before[name]):
                        np.add(v, self.momentum * old, out=v)
            is_free = not self.momentum and step.dtype == parameter.dtype
            result[name] = step if is_free else np.empty(parameter.shape, parameter.dtype)
            for target, p, v in _blocks(result[name], parameter, step):
                _minus(target, p, self.learning_rate, v)
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
            first[name], second[name] = self._moments(name, d, state.slots)
            result[name] = np.empty(parameter.shape, parameter.dtype)
            for target, p, m, v in _blocks(result[name], parameter, first[name], second[name]):
                denominator = np.sqrt(v / unbias) + self.epsilon
                _minus(target, p, rate, np.divide(m, denominator, out=denominator))
        return result, OptimizerState({"first": first, "second": second}, step)

    def _moments(self, name: str, direction: Array, slots: Slots) -> tuple[Array, Array]:
        """The new moments of a tensor; the first takes ``direction``'s memory."""
        second = np.empty_like(direction)
        for m, v in _blocks(direction, second):
            np.multiply(1 - self.beta2, np.square(m), out=v)
            np.multiply(1 - self.beta1, m, out=m)
        if name in slots["first"]:
            for m, v, old_m, old_v in _blocks(direction, second, slots["first"][name], slots["second"][name]):
                np.add(m, self.beta1 * old_m, out=m)
                np.add(v, self.beta2 * old_v, out=v)
        return direction, second


def _blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Arrays of one size, flat, piece by piece; those that are written into must be contiguous."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield tuple(array[start : start + BLOCK] for array in flat)


def _minus(target: Array, parameter: Array, rate: float, step: Array) -> None:
    """``target = parameter - rate * step``, calculated in the step's dtype; ``target`` may be ``step`` itself."""
    moved = np.multiply(step, rate)
    np.subtract(parameter, moved, out=moved, dtype=moved.dtype, casting="unsafe")
    target[...] = moved


#: Name in the configuration, and what makes the optimiser from (learning rate, momentum).
OPTIMIZERS: Mapping[str, Callable[[float, float], Optimizer]] = {
    "sgd": Sgd,
    "adam": lambda rate, beta1: Adam(rate, beta1=beta1 or 0.9),
}
