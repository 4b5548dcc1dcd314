"""From one version to the next: the optimiser moves what trains, statistics are replaced, counters add up."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aggregator.core.screen import is_finite
from aggregator.optimizers import Optimizer, OptimizerState
from broker.errors import StrategyError
from broker.messages import Array, Mode, ModelSpec, TensorRole, Tensors, TensorSpec

__all__ = ["next_parameters"]


def next_parameters(
    model: ModelSpec,
    parameters: Tensors,
    aggregate: Mapping[str, Array],
    *,
    mode: Mode,
    optimizer: Optimizer,
    state: OptimizerState,
) -> tuple[dict[str, Array], OptimizerState]:
    """The parameters after one step along ``aggregate``, in the model's order, and the optimiser's new state.

    Statistics and counters are not the optimiser's: a learning rate on a running variance has no meaning.
    Counters are rounded to the nearest integer (ties to even).

    Raises:
        StrategyError: if a result is not finite or has another shape than the model; nothing has changed then.
    """
    trained = [t.name for t in model.tensors if t.role is TensorRole.PARAMETER]
    if mode is Mode.GRADIENT:
        direction = {name: aggregate[name] for name in trained}
    else:
        direction = {name: np.asarray(np.negative(aggregate[name])) for name in trained}
    with np.errstate(over="ignore", invalid="ignore"):
        moved, new_state = optimizer.apply(parameters, direction, state)
        result = {t.name: _next(t, parameters[t.name], aggregate[t.name], moved) for t in model.tensors}
    for tensor in model.tensors:
        array = result[tensor.name]
        if array.shape != tensor.shape or array.dtype.name != tensor.dtype:
            raise StrategyError(f"{tensor.name} became {array.dtype.name}{list(array.shape)}; the model has {tensor}")
        if not is_finite(array):
            raise StrategyError(
                f"{tensor.name} is not finite after the step, so there is no step; lower "
                "aggregator.learning_rate, or look for a worker whose updates explode"
            )
        array.flags.writeable = False
    return result, new_state


def _next(tensor: TensorSpec, value: Array, aggregate: Array, moved: Mapping[str, Array]) -> Array:
    if tensor.role is TensorRole.PARAMETER:
        return moved[tensor.name]
    if tensor.role is TensorRole.STATISTIC:
        return aggregate.astype(value.dtype)
    return np.asarray(value + np.rint(aggregate)).astype(value.dtype)
