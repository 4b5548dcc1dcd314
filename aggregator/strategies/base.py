"""What a strategy is: a small frozen value that folds updates into an accumulator and finishes a round.

It is pure: no I/O, clock or randomness. It owns the accumulator and may write into it; it never writes into an
update. The accumulator is part of every checkpoint, so all that a strategy knows must stand in it.

A strategy that needs all updates of a round has an attribute ``gathers`` that is true. Its accumulator comes with
``rows``, to which :meth:`Strategy.fold` adds one for each update (:mod:`aggregator.strategies.gather`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

import numpy as np

from aggregator.strategies.rows import GrowingRows, Rows, Spool
from aggregator.strategies.rules.base import Occasion
from broker.errors import ConfigError
from broker.messages import Array, ModelSpec, TensorRole, Update

__all__ = ["Accumulator", "Scalable", "Strategy", "accumulator_dtype", "begin", "gathers", "resume", "scaled"]


@dataclass(slots=True)
class Accumulator:
    """A round in the making."""

    tensors: dict[str, Array] = field(default_factory=dict)
    """Running sums, in the dtypes of :func:`accumulator_dtype`; shapes are the model's."""
    share: float = 0.0
    """Sum of the updates' shares, before staleness."""
    weight: float = 0.0
    """Sum of the weights with which they went in."""
    count: int = 0
    """Updates folded."""
    effort: float = 0.0
    """Sum of the updates' efforts, each times its share, where the strategy goes by them."""
    rows: Rows | None = None
    """The updates themselves, for a strategy that needs them all; those of a round that is open can grow."""
    occasion: Occasion = field(default_factory=Occasion)
    """What else a rule may go by; it is said when the round closes."""

    @property
    def pull(self) -> float:
        """The updates' mean staleness weight, by share: how far towards parameters that workers send a round goes."""
        return self.weight / self.share if self.share else 1.0

    def lend(self) -> Accumulator:
        """This accumulator as it is now, with the same arrays: whoever has it sees what is written into them.

        Rows are never written into, and those that come later are not seen.
        """
        rows = self.rows.lend() if isinstance(self.rows, GrowingRows) else self.rows
        return replace(self, tensors=dict(self.tensors), rows=rows)

    def copy(self) -> Accumulator:
        """An accumulator that shares no array with this one, but its rows."""
        return replace(self, tensors={name: array.copy() for name, array in self.tensors.items()})


class Strategy(Protocol):
    """How the updates of one round become one aggregate."""

    def init(self, model: ModelSpec) -> Accumulator:
        """The accumulator of an empty round."""

    def fold(self, accumulator: Accumulator, update: Update, staleness: int) -> float:
        """Add ``update`` to ``accumulator`` in place; returns the weight with which it went in."""

    def finish(self, accumulator: Accumulator, model: ModelSpec) -> dict[str, Array]:
        """The aggregate of a round with at least one update, by tensor, in the accumulator's dtypes.

        For parameters the gradient or delta to apply, or, where updates are parameters, a mean of these; for
        statistics their new values, for counters the change.

        The accumulator is used up: the result may share its arrays.
        """


@runtime_checkable
class Scalable(Protocol):
    """A strategy that can give an update more or less weight than it would have."""

    def scaled(self, factor: float) -> Strategy:
        """This strategy with ``factor`` times the weight of whatever is folded."""


def scaled(strategy: Strategy, factor: float) -> Strategy:
    """``strategy`` with ``factor`` times the weight. Raises :class:`ConfigError` if it cannot be had."""
    if factor == 1.0:
        return strategy
    if not isinstance(strategy, Scalable):
        raise ConfigError(
            "this strategy cannot weigh updates by their workers' rates: set aggregator.fairness = 'none'"
        )
    return strategy.scaled(factor)


def gathers(strategy: Strategy) -> bool:
    """Whether ``strategy`` needs all updates of a round."""
    return bool(getattr(strategy, "gathers", False))


def begin(strategy: Strategy, model: ModelSpec, spool: Spool) -> Accumulator:
    """What ``strategy`` folds a round's first update into; rows, if it needs any, are kept in ``spool``."""
    accumulator = strategy.init(model)
    if gathers(strategy):
        accumulator.rows = spool.begin(model)
    return accumulator


def resume(accumulator: Accumulator, spool: Spool) -> Accumulator:
    """``accumulator`` as a checkpoint has it, to go on with. It shares the arrays."""
    rows = accumulator.rows
    return accumulator if rows is None else replace(accumulator, rows=spool.resume(rows))


def accumulator_dtype(dtype: str, role: TensorRole) -> np.dtype[Any]:
    """The dtype that sums of ``dtype`` are kept in: float32, and float64 for float64 and for integers.

    Half-precision sums would lose small updates; integers in float64 are exact up to 2**53.
    """
    wide = dtype == "float64" or role is TensorRole.COUNTER
    return np.dtype(np.float64 if wide else np.float32)
