"""What the last round came to, kept beside an optimiser's own memory: for rules that begin with it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from aggregator.optimizers.base import Optimizer, OptimizerState
from broker.messages import Array, Mode, ModelSpec, TensorRole, Tensors

__all__ = ["Remembering"]

SLOT = "direction"


@dataclass(frozen=True, slots=True)
class Remembering:
    """``optimizer``, and the direction of its last step as one more slot: one more model in memory and in checkpoints.

    So it comes back with a checkpoint, with a version that is rolled back to, and in a replay.
    """

    optimizer: Optimizer

    def init(self) -> OptimizerState:
        """No step yet."""
        return OptimizerState({**self.optimizer.init().slots, SLOT: {}})

    def scaled(self, factor: float) -> Remembering:
        """With ``factor`` times the learning rate."""
        return Remembering(self.optimizer.scaled(factor))

    def apply(
        self, parameters: Tensors, direction: dict[str, Array], state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """One step of ``optimizer``."""
        kept = {name: array.copy() for name, array in direction.items()}
        own = {name: slot for name, slot in state.slots.items() if name != SLOT}
        result, after = self.optimizer.apply(parameters, direction, OptimizerState(own, state.step))
        return result, OptimizerState({**after.slots, SLOT: kept}, after.step)

    @staticmethod
    def last(state: OptimizerState, model: ModelSpec, mode: Mode) -> Array | None:
        """The aggregate of the last step, flat in the order of a row; None before the first, or if it was not kept.

        Args:
            state: the optimiser's.
            model: whose parameters they are.
            mode: in that of deltas the direction is minus the aggregate.
        """
        slot = state.slots.get(SLOT)
        if not slot:
            return None
        names = [tensor.name for tensor in model.tensors if tensor.role is TensorRole.PARAMETER]
        flat: Array = np.concatenate([slot[name].reshape(-1) for name in names])
        return np.negative(flat, out=flat) if mode is Mode.DELTA else flat
