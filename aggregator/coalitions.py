"""The rounds of a run once more, as games: which parameters would the updates of some of its workers have made?"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from aggregator.recipe import Recipe
from aggregator.replay import Fetch, Link, Rebuild, needed
from aggregator.schedules import factor_at, schedule_of
from broker.messages import Array, Mode, TensorRole, Tensors, Update, Values, pieces

__all__ = ["PlayedRound", "played_rounds"]

#: Elements that are multiplied together.
BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class PlayedRound:
    """One round, with the state before it and all its updates: a model for each in memory."""

    before: Rebuild
    link: Link
    updates: tuple[Update, ...]

    @property
    def version(self) -> int:
        """The one that it made."""
        return self.link.record.version

    @property
    def workers(self) -> tuple[str, ...]:
        """Whose updates they are, sorted."""
        return tuple(sorted({update.id.worker for update in self.updates}))

    def parameters(self, coalition: frozenset[str]) -> Tensors:
        """What the run's strategy and optimiser would have made of the updates of ``coalition`` alone.

        The mean is then that of these updates, as in the papers. Without anybody, or if the step is not finite, the
        parameters stay as they were.
        """
        if not coalition:
            return self.before.parameters
        own = self.before.branch(frozenset(self.workers) - coalition)
        own.open(self.link)
        for index, update in enumerate(self.updates):
            if own.wants(index):
                own.fold(index, update)
        own.close()
        return own.parameters

    def halfway(self) -> dict[str, Array]:
        """Half of the way from the version before to the one that was made, in the parameters' dtypes."""
        after = self.parameters(frozenset(self.workers))
        return {
            name: (old + (after[name] - old) / 2).astype(old.dtype) if old.dtype.kind == "f" else old
            for name, old in self.before.parameters.items()
        }

    def first_order(self, gradient: Tensors) -> dict[str, float]:
        """What each worker's part of the step changes in a loss with this gradient, to first order; less loss is more.

        The step is taken for plain gradient descent along the weighted mean: -g' (rate w_i u_i / sum of shares). With
        the gradient from :meth:`halfway` that is the Shapley value of a quadratic loss, for coalitions whose mean
        keeps the divisor of the whole round. Other optimisers scale and turn the step; the order of workers, which is
        what matters here, mostly stays.
        """
        record, before = self.link.record, self.before.parameters
        recipe = Recipe.of(record.settings)
        rate = recipe.learning_rate * factor_at(schedule_of(recipe), record.version - 1)
        rate = -rate if recipe.mode is Mode.GRADIENT else rate
        shares = sum(entry.examples if recipe.weighting == "examples" else 1 for entry in record.updates)
        names = [tensor.name for tensor in self.before.model.tensors if tensor.role is TensorRole.PARAMETER]
        start = _along(gradient, before, names) if recipe.mode is Mode.PARAMETERS else 0.0
        values = dict.fromkeys(self.workers, 0.0)
        for entry, update in zip(record.updates, self.updates, strict=True):
            values[entry.id.worker] -= rate * entry.weight * (_along(gradient, update.tensors, names) - start) / shares
        return values


def played_rounds(links: Iterable[Link], fetch: Fetch, original: Rebuild) -> Iterator[PlayedRound]:
    """Move ``original`` along ``links``; gives each round before it is made.

    Rounds without updates, and one whose beginning is in the state that the rebuild started from, are passed over.

    Raises :class:`LineageError` at the first difference to what the history tells.
    """
    for link in links:
        entries = needed(link)
        updates = tuple(fetch(entry, link.record.epoch) for entry in entries)
        if updates and not link.without and link.record.updates and not original.begins_with_part:
            yield PlayedRound(original.branch(frozenset()), link, updates)
        original.open(link)
        for index, update in enumerate(updates):
            if original.wants(index):
                original.fold(index, update)
        original.close()
        if not link.without:
            original.check(link.record)


def _along(gradient: Tensors, tensors: Mapping[str, Values], names: Sequence[str]) -> float:
    """The inner product of the tensors called ``names``."""
    total = 0.0
    for name in names:
        slope, end = gradient[name].reshape(-1), 0
        for piece in pieces(tensors[name]):
            for start in range(0, piece.size, BLOCK):
                block = piece.reshape(-1)[start : start + BLOCK].astype(np.float64)
                begin, end = end, end + block.size
                total += float(np.dot(block, slope[begin:end].astype(np.float64)))
    return total
