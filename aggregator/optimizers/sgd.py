"""Gradient descent, with momentum, Nesterov's too, and weight decay."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.optimizers.base import OptimizerState, Rated, add_decay, blocks, minus
from aggregator.recipe import Recipe
from broker.messages import Array, Tensors

__all__ = ["Sgd"]


@dataclass(frozen=True, slots=True)
class Sgd(Rated):
    """As torch.optim.SGD: ``d += decay * p``, ``m = momentum * m + d``, ``p = p - rate * m``.

    With ``nesterov``, ``p = p - rate * (d + momentum * m)`` (Sutskever et al. 2013, in torch's form).
    In delta mode a learning rate of 1 without momentum is plain federated averaging, with momentum FedAvgM (Hsu et al.
    2019, arXiv 1909.06335).
    """

    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0

    @classmethod
    def of(cls, recipe: Recipe) -> Sgd:
        """As ``recipe`` says."""
        return cls(recipe.learning_rate, recipe.momentum, recipe.nesterov, recipe.weight_decay)

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
            add_decay(step, parameter, self.weight_decay)
            if self.momentum:
                velocity[name] = step
            is_free = not self.momentum and step.dtype == parameter.dtype
            result[name] = step if is_free else np.empty(parameter.shape, parameter.dtype)
            old = before.get(name)
            for target, p, v, *m in blocks(result[name], parameter, step, *([] if old is None else [old])):
                minus(target, p, self.learning_rate, self._moved(v, m[0] if m else None))
        return result, OptimizerState({"momentum": velocity} if self.momentum else {}, state.step + 1)

    def _moved(self, velocity: Array, old: Array | None) -> Array:
        """What is subtracted; ``velocity``, which is the direction at first, becomes the new momentum."""
        ahead = velocity.copy() if self.nesterov else velocity
        if old is not None:
            np.add(velocity, self.momentum * old, out=velocity)
        return np.add(ahead, self.momentum * velocity, out=ahead) if self.nesterov else velocity
