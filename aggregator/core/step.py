"""From one version to the next: the optimiser moves what trains, statistics are replaced, counters add up."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from aggregator.core.screen import is_finite
from aggregator.optimizers import Optimizer, OptimizerState
from aggregator.strategies.base import Accumulator, Strategy
from broker.errors import FedmqError, StrategyBroken, StrategyError
from broker.messages import Array, Mode, ModelSpec, TensorRole, Tensors, TensorSpec

__all__ = ["aggregate_of", "broken", "next_parameters"]


def broken(part: object, error: Exception) -> StrategyBroken:
    """What to raise for ``error``, which ``part``, a strategy or an optimiser, has raised."""
    return StrategyBroken(f"{_named(part)} raised {type(error).__name__}: {error}; no version was made, no update lost")


def aggregate_of(strategy: Strategy, accumulator: Accumulator, model: ModelSpec) -> dict[str, Array]:
    """What ``strategy`` makes of a round's ``accumulator``, which is used up.

    Raises:
        StrategyBroken: it raised, or gave other tensors than the model's.
        StrategyError: as it says.
    """
    try:
        aggregate = strategy.finish(accumulator, model)
    except (FedmqError, MemoryError):
        raise
    except Exception as error:
        raise broken(strategy, error) from error
    if not isinstance(aggregate, dict):
        raise StrategyBroken(f"{_named(strategy)} gave a {type(aggregate).__name__}, no dictionary of tensors")
    wanted = {tensor.name: tensor.shape for tensor in model.tensors}
    given = {name: getattr(array, "shape", None) for name, array in aggregate.items()}
    if wanted != given:
        names = [name for name in wanted | given if wanted.get(name) != given.get(name)]
        raise StrategyBroken(f"{_named(strategy)} gave other tensors than the model's: {', '.join(names[:3])}")
    return aggregate


def next_parameters(
    model: ModelSpec,
    parameters: Tensors,
    aggregate: dict[str, Array],
    *,
    mode: Mode,
    optimizer: Optimizer,
    state: OptimizerState,
    pull: float = 1.0,
) -> tuple[dict[str, Array], OptimizerState]:
    """The parameters after one step along ``aggregate``, in the model's order, and the optimiser's new state.

    Statistics and counters are not the optimiser's: a learning rate on a running variance has no meaning.
    Counters are rounded to the nearest integer (ties to even).

    Where updates are parameters, the direction is ``pull`` times what lies between the parameters and ``aggregate``:
    gradient descent with rate alpha makes ``(1 - alpha * pull) * parameters + alpha * pull * aggregate`` of them,
    which is FedAsync (Xie et al. 2019, arXiv 1903.03934, algorithm 1) for one update, whose staleness weight is
    ``pull``.

    ``aggregate`` is used up: it is empty afterwards, and the result and the new state have its memory where they
    can. ``parameters`` and ``state`` are not written into.

    Raises:
        StrategyError: if a result is not finite; parameters and state have not changed then.
        StrategyBroken: if it has another shape or dtype than the model, or the optimiser raised; likewise.
    """
    own = {tensor.name: _own(tensor, aggregate.pop(tensor.name)) for tensor in model.tensors}
    direction = {t.name: own.pop(t.name) for t in model.tensors if t.role is TensorRole.PARAMETER}
    with np.errstate(over="ignore", invalid="ignore"):
        if mode is Mode.DELTA:
            for array in direction.values():
                np.negative(array, out=array)
        elif mode is Mode.PARAMETERS:
            for name, array in direction.items():
                np.subtract(parameters[name], array, out=array, dtype=array.dtype, casting="unsafe")
                np.multiply(array, pull, out=array)
        try:
            moved, new_state = optimizer.apply(parameters, direction, state)
        except (FedmqError, MemoryError):
            raise
        except Exception as error:
            raise broken(optimizer, error) from error
        if lacking := [t.name for t in model.tensors if t.role is TensorRole.PARAMETER and t.name not in moved]:
            raise StrategyBroken(f"{_named(optimizer)} gave no next {', '.join(lacking[:3])}")
        result = {t.name: _next(t, parameters[t.name], own, moved) for t in model.tensors}
    for tensor in model.tensors:
        array = result[tensor.name]
        _require_kind(tensor, array.shape, array.dtype.name)
        if not is_finite(array):
            raise StrategyError(
                f"{tensor.name} is not finite after the step, so there is no step; lower "
                "aggregator.learning_rate, or look for a worker whose updates explode"
            )
        array.flags.writeable = False
    return result, new_state


def _named(part: object) -> str:
    return f"{type(part).__module__}.{type(part).__qualname__}"


def _own(tensor: TensorSpec, array: Array) -> Array:
    """``array``, or a copy if it cannot be written into in one row."""
    _require_kind(tensor, array.shape, tensor.dtype)
    return np.require(array, requirements=["C", "W"])


def _require_kind(tensor: TensorSpec, shape: tuple[int, ...], dtype: str) -> None:
    if (shape, dtype) != (tensor.shape, tensor.dtype):
        raise StrategyBroken(f"{tensor.name} became {dtype}{list(shape)}; the model has {tensor}")


def _next(tensor: TensorSpec, value: Array, own: Mapping[str, Array], moved: Mapping[str, Array]) -> Array:
    if tensor.role is TensorRole.PARAMETER:
        return moved[tensor.name]
    if tensor.role is TensorRole.STATISTIC:
        return own[tensor.name].astype(value.dtype, copy=False)
    if tensor.role is TensorRole.VARIATE:
        return np.asarray(value + own[tensor.name], value.dtype)
    return np.asarray(value + np.rint(own[tensor.name])).astype(value.dtype)
