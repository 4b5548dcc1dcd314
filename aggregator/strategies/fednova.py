"""FedNova: normalised averaging (Wang et al. 2020, arXiv 2007.07481, equation 10).

Where workers make different numbers of local steps, the mean of their deltas minimises another objective than the
mean of theirs: whoever steps more often pulls harder. FedNova takes each delta d_i per step and gives all the mean
number of steps. With examples n_i (or 1), efforts a_i (the norms of the paper's vectors a_i: the number of steps, for
plain SGD), staleness tau_i and staleness weight s, a round gives

    (sum_i n_i a_i / sum_i n_i) * sum_i s(tau_i) n_i d_i / a_i / sum_i n_i

With equal efforts, and with one worker, that is :class:`Mean`. Statistics and counters are as there. The paper's
rounds are synchronous and its weights p_i = n_i / n are of all workers; here they are of those in the round, and a
stale update takes a shorter step, as in FedBuff: what a_i corrects is how much a worker did, not how old it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from aggregator.recipe import Recipe
from aggregator.staleness import times, weight_of
from aggregator.strategies.base import Accumulator
from aggregator.strategies.mean import Mean, add_scaled
from broker.messages import Array, ModelSpec, TensorRole, Update, pieces

__all__ = ["FedNova"]


@dataclass(frozen=True, slots=True)
class FedNova:
    """Mean of the deltas per step, times the mean number of steps; memory of one model."""

    weighting: Literal["examples", "uniform"]
    staleness_weight: Callable[[int], float]

    needs_effort = True

    @classmethod
    def of(cls, recipe: Recipe) -> FedNova:
        """As ``recipe`` says."""
        return cls(recipe.weighting, weight_of(recipe))

    def scaled(self, factor: float) -> FedNova:
        """With ``factor`` times the weights."""
        return replace(self, staleness_weight=times(self.staleness_weight, factor))

    def init(self, model: ModelSpec) -> Accumulator:
        """Zeros."""
        return Mean(self.weighting, self.staleness_weight).init(model)

    def fold(self, accumulator: Accumulator, update: Update, staleness: int) -> float:
        """Add the update, weighted, and parameters per step."""
        share = float(update.examples) if self.weighting == "examples" else 1.0
        weight = share * self.staleness_weight(staleness)
        for tensor in update.model.tensors:
            factor = weight
            if tensor.role is TensorRole.PARAMETER:
                factor = weight / update.effort
            elif tensor.role is TensorRole.VARIATE:
                factor = 1.0
            add_scaled(accumulator.tensors[tensor.name].reshape(-1), pieces(update.tensors[tensor.name]), factor)
        accumulator.share += share
        accumulator.weight += weight
        accumulator.effort += share * update.effort
        accumulator.count += 1
        return weight

    def finish(self, accumulator: Accumulator, model: ModelSpec) -> dict[str, Array]:
        """Divide the sums, and give back the mean number of steps."""
        for tensor in model.tensors:
            total = accumulator.tensors[tensor.name]
            if tensor.role is TensorRole.PARAMETER:
                np.multiply(total, accumulator.effort / accumulator.share / accumulator.share, out=total)
            elif tensor.role is not TensorRole.VARIATE:
                np.divide(total, accumulator.weight, out=total)
        return accumulator.tensors
