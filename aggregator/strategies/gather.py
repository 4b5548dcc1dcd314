"""Strategies that need all updates of a round: a rule for the parameters, the mean for what is no step.

What a rule (:mod:`aggregator.strategies.rules`) gives goes where the mean would. Its rows are weighted by staleness, so
that any rule gives what :class:`Mean` with uniform weights does if the updates agree. Numbers of examples play no part:
a worker could claim any.

Statistics and counters are averaged, by their staleness weights: they are no steps, and the distances between
parameters say nothing of them. So a rule does not protect from a worker that sends a wild running variance.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import ClassVar

from aggregator.staleness import times
from aggregator.strategies.base import Accumulator, accumulator_dtype
from aggregator.strategies.mean import Mean
from aggregator.strategies.rows import GrowingRows, row_of
from aggregator.strategies.rules.base import Occasion, Rule
from broker.errors import StrategyError
from broker.messages import Array, ModelSpec, TensorRole, Update

__all__ = ["Gather"]


@dataclass(frozen=True, slots=True)
class Gather:
    """Keeps all updates until the round closes. Memory of one model, and of a few blocks of the rows."""

    gathers: ClassVar[bool] = True

    rule: Rule
    """What makes one of them."""
    staleness_weight: Callable[[int], float]

    def scaled(self, factor: float) -> Gather:
        """With ``factor`` times the weights."""
        return replace(self, staleness_weight=times(self.staleness_weight, factor))

    def init(self, model: ModelSpec) -> Accumulator:
        """Zeros for what is averaged; the parameters are in the rows."""
        return self._mean().init(_without_parameters(model))

    def fold(self, accumulator: Accumulator, update: Update, staleness: int) -> float:
        """Add a row, then the rest to the mean. If there is no room for the row, nothing was added."""
        rows = accumulator.rows
        if not isinstance(rows, GrowingRows):
            raise TypeError("an accumulator without rows: see aggregator.strategies.base.begin")
        weight = self.staleness_weight(staleness)
        rows.append(row_of(update, update.model), weight, update.id.worker)
        return self._mean().fold(accumulator, update, staleness)

    def finish(self, accumulator: Accumulator, model: ModelSpec) -> dict[str, Array]:
        """Apply the rule. Raises :class:`StrategyError` if it gives something of another shape."""
        rows = accumulator.rows
        if rows is None:
            raise TypeError("an accumulator without rows: see aggregator.strategies.base.begin")
        result = self.rule(rows, accumulator.occasion)
        accumulator.occasion = Occasion()  # the last aggregate takes the memory of a model
        if result.shape != (rows.size,):
            raise StrategyError(f"{self.rule} gave an array of shape {result.shape}; it must be ({rows.size},)")
        aggregate = self._mean().finish(accumulator, _without_parameters(model))
        end = 0
        for tensor in model.tensors:
            if tensor.role is TensorRole.PARAMETER:
                begin, end = end, end + math.prod(tensor.shape)
                own = result[begin:end].reshape(tensor.shape)
                aggregate[tensor.name] = own.astype(accumulator_dtype(tensor.dtype, tensor.role), copy=False)
        return aggregate

    def _mean(self) -> Mean:
        return Mean("uniform", self.staleness_weight)


def _without_parameters(model: ModelSpec) -> ModelSpec:
    return ModelSpec(tuple(tensor for tensor in model.tensors if tensor.role is not TensorRole.PARAMETER))
