"""LAMB (You et al. 2020, arXiv 1904.00962, algorithm 2): AdamW whose step is as long as the tensor's norm allows."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from aggregator.optimizers.base import OptimizerState, blocks, minus
from aggregator.optimizers.moments import Moments
from broker.messages import Array, Tensors

__all__ = ["Lamb"]


@dataclass(frozen=True, slots=True)
class Lamb(Moments):
    """``u = mean / (sqrt(square) + epsilon) + decay * p``, ``p = p - rate * (norm(p) / norm(u)) * u``.

    A layer is a tensor here, the function phi of the paper the identity, and where a norm is zero the ratio is 1, as
    in the authors' code. ``u`` is calculated twice, once for its norm, rather than kept: a model's memory.
    """

    epsilon: float = 1e-6

    def apply(
        self, parameters: Tensors, direction: dict[str, Array], state: OptimizerState
    ) -> tuple[dict[str, Array], OptimizerState]:
        """One step."""
        step = state.step + 1
        unbias = 1 - self.beta1**step, 1 - self.beta2**step
        first: dict[str, Array] = {}
        second: dict[str, Array] = {}
        result: dict[str, Array] = {}
        for name in list(direction):
            parameter = parameters[name]
            m, v = first[name], second[name] = self.moments(name, direction.pop(name), state.slots)
            ratio = _ratio(
                _norm(p for (p,) in blocks(parameter)), _norm(u for _, u in self._moves(parameter, m, v, unbias))
            )
            result[name] = np.empty(parameter.shape, parameter.dtype)
            moves = self._moves(parameter, m, v, unbias)
            for (target,), (p, u) in zip(blocks(result[name]), moves, strict=True):
                minus(target, p, self.learning_rate * ratio, u)
        return result, OptimizerState({"first": first, "second": second}, step)

    def _moves(
        self, parameter: Array, m: Array, v: Array, unbias: tuple[float, float]
    ) -> Iterator[tuple[Array, Array]]:
        """The parameter and ``u``, block by block."""
        for p, mean, square in blocks(parameter, m, v):
            denominator = np.sqrt(square / unbias[1]) + self.epsilon
            move = np.divide(mean / unbias[0], denominator, out=denominator)
            np.add(move, np.multiply(p, self.weight_decay, dtype=move.dtype, casting="unsafe"), out=move)
            yield p, move


def _norm(pieces: Iterable[Array]) -> float:
    # numpy's own pairwise sum in float64, not BLAS, whose order of addition depends on the machine.
    return math.sqrt(math.fsum(float(np.sum(np.square(piece, dtype=np.float64))) for piece in pieces))


def _ratio(of_parameter: float, of_move: float) -> float:
    if not (of_parameter and of_move):
        return 1.0
    # What is left of machines' differences in the last bits of a sum goes with the rounding.
    return float(np.float32(of_parameter / of_move))
