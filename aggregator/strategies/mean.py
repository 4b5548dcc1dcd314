"""The weighted mean: FedSGD, FedAvg (McMahan et al. 2017), FedBuff (Nguyen et al. 2022), FedAsync, by its settings.

With examples n_i (or 1 for uniform weights), staleness tau_i and staleness weight s, a round of updates u_i
gives

    sum_i s(tau_i) n_i u_i / sum_i n_i

The divisor leaves s out. For uniform weights it is K, as in FedBuff's algorithm 1, so that a round of stale
updates takes a shorter step; without staleness it is FedAvg's weighted mean, bit for bit. Statistics and
counters are no steps: their sums are divided by the sum of s(tau_i) n_i, so that a mean of variances is one. So are
those of parameters that workers send: they are a place to go to, and how far is for the step to say. With
``normalized``, that is the divisor of all: stale updates then count less beside fresh ones, and a round of nothing
but stale ones makes a whole step. Control variates are added up as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from aggregator.recipe import Recipe
from aggregator.staleness import times, weight_of
from aggregator.strategies.base import Accumulator, accumulator_dtype
from broker.messages import Array, Mode, ModelSpec, TensorRole, Update, pieces

__all__ = ["Mean", "add_scaled"]

# Elements that are multiplied and added while they are in the processor's cache. Of float32, 100 MB to 1 GB: 4 GB/s
# at 4 Ki elements (the interpreter's share), 8 at 64 Ki, 11 from 256 Ki to 1 Mi; larger ones take memory for nothing.
_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Mean:
    """Weighted mean with a staleness weight; memory of one model, whatever the number of updates."""

    weighting: Literal["examples", "uniform"]
    staleness_weight: Callable[[int], float]
    normalized: bool = False

    @classmethod
    def of(cls, recipe: Recipe) -> Mean:
        """As ``recipe`` says."""
        are_parameters = recipe.mode is Mode.PARAMETERS
        return cls(recipe.weighting, weight_of(recipe), recipe.normalize_staleness or are_parameters)

    def scaled(self, factor: float) -> Mean:
        """With ``factor`` times the weights."""
        return replace(self, staleness_weight=times(self.staleness_weight, factor))

    def init(self, model: ModelSpec) -> Accumulator:
        """Zeros."""
        return Accumulator({t.name: np.zeros(t.shape, accumulator_dtype(t.dtype, t.role)) for t in model.tensors})

    def fold(self, accumulator: Accumulator, update: Update, staleness: int) -> float:
        """Add the weighted update: the tensors that ``accumulator`` has sums of."""
        share = float(update.examples) if self.weighting == "examples" else 1.0
        weight = share * self.staleness_weight(staleness)
        roles = {tensor.name: tensor.role for tensor in update.model.tensors}
        for name, total in accumulator.tensors.items():
            factor = 1.0 if roles[name] is TensorRole.VARIATE else weight
            add_scaled(total.reshape(-1), pieces(update.tensors[name]), factor)
        accumulator.share += share
        accumulator.weight += weight
        accumulator.count += 1
        return weight

    def finish(self, accumulator: Accumulator, model: ModelSpec) -> dict[str, Array]:
        """Divide the sums."""
        for tensor in model.tensors:
            total = accumulator.tensors[tensor.name]
            if tensor.role is TensorRole.VARIATE:
                continue
            is_step = tensor.role is TensorRole.PARAMETER and not self.normalized
            np.divide(total, accumulator.share if is_step else accumulator.weight, out=total)
        return accumulator.tensors


def add_scaled(total: Array, values: Iterable[Array], weight: float) -> None:
    """``total += weight * values`` without a temporary of the tensor's size.

    Args:
        total: flat, and written into.
        values: flat, in consecutive pieces of any length. How they are cut makes no difference to the
            result, not in a single bit.
        weight: of all of them.
    """
    scratch = np.empty(min(_BLOCK, total.size), total.dtype)
    end = 0
    for piece in values:
        for start in range(0, piece.size, _BLOCK):
            block = piece[start : start + _BLOCK]
            begin, end = end, end + block.size
            target = total[begin:end]
            if weight != 1.0:  # the product with 1 would be the same, and takes half of the time
                block = np.multiply(block, weight, out=scratch[: block.size], casting="unsafe", dtype=total.dtype)
            np.add(target, block, out=target, casting="unsafe", dtype=total.dtype)
