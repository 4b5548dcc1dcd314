"""What a server optimiser is: from the parameters and a descent direction to the next parameters.

Pairs of pure functions on dictionaries of arrays. ``direction`` is what gradient descent would subtract: the
mean gradient in gradient mode, minus the mean delta in delta mode (Reddi et al. 2021, arXiv 2003.00295,
algorithm 2, where minus delta is called the pseudo-gradient). State and arithmetic are kept in the
accumulator's dtypes; the result has the parameters' dtypes.

Memory: a step goes tensor by tensor, in blocks, and ``direction`` is used up. Its arrays become the next parameters
or the optimiser's new state, so that a step allocates nothing for SGD, one model for momentum and Adagrad (the
parameters) and two for Adam and its kin (the parameters and the second moment), while the old state is still there.
Parameters and state that come in are never written into, since a checkpoint of the previous version may be on its way
to the disk, and since a step that is not finite is taken back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, Self

import numpy as np

from broker.messages import Array, Tensors

__all__ = ["Optimizer", "OptimizerState", "Rated", "Slots", "add_decay", "blocks", "minus"]

#: Elements that go through a step together: what it takes besides its results is a few blocks of 1 MiB.
BLOCK = 1 << 18

#: Slots (``momentum``, ``first``, ``second``) by tensor name.
Slots = Mapping[str, Tensors]


@dataclass(frozen=True, slots=True)
class OptimizerState:
    """What an optimiser remembers; part of every checkpoint."""

    slots: Slots
    """By the slot's name. An optimiser with other names than those of the state starts without memory."""
    step: int = 0
    """Steps made."""


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

    def scaled(self, factor: float) -> Optimizer:
        """This optimiser with ``factor`` times its learning rate, as a schedule asks for."""


@dataclass(frozen=True, slots=True)
class Rated:
    """Base of those that have nothing but a learning rate to scale."""

    learning_rate: float

    def scaled(self, factor: float) -> Self:
        """See :class:`Optimizer`."""
        return replace(self, learning_rate=self.learning_rate * factor)


def blocks(*arrays: Array) -> Iterator[tuple[Array, ...]]:
    """Arrays of one size, flat, piece by piece; those that are written into must be contiguous."""
    flat = [array.reshape(-1) for array in arrays]
    for start in range(0, flat[0].size, BLOCK):
        yield tuple(array[start : start + BLOCK] for array in flat)


def minus(target: Array, parameter: Array, rate: float, step: Array) -> None:
    """``target = parameter - rate * step``, calculated in the step's dtype; ``target`` may be ``step`` itself."""
    moved = np.multiply(step, rate)
    np.subtract(parameter, moved, out=moved, dtype=moved.dtype, casting="unsafe")
    target[...] = moved


def add_decay(direction: Array, parameter: Array, decay: float) -> None:
    """``direction += decay * parameter``, in the direction's dtype: weight decay as a part of the gradient (L2)."""
    if not decay:
        return
    for d, p in blocks(direction, parameter):
        np.add(d, np.multiply(p, decay, dtype=d.dtype, casting="unsafe"), out=d)
