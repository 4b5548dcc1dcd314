"""What each worker's update is worth: Shapley values of a round, exact and by Monte Carlo, and leaving one out.

A *game* is a utility of coalitions of workers: how good the model is that the updates of just these workers would have
made. What the utility is, and how a coalition's model comes to be, is the caller's business; every coalition is asked
for once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

__all__ = ["METHODS", "MOST_EXACT", "Utility", "exact_shapley", "gtg_shapley", "leave_one_out"]

#: How good the model of a coalition is; larger is better.
Utility = Callable[[frozenset[str]], float]

Values = dict[str, float]

#: Workers up to which exact values can be waited for: two to their number are models to evaluate.
MOST_EXACT = 12


def exact_shapley(workers: Sequence[str], utility: Utility) -> Values:
    """Shapley values: each worker's marginal utility, averaged over all orders in which they could have come.

    Takes 2^n utilities for n workers.

    Raises:
        ValueError: more workers than :data:`MOST_EXACT`.
    """
    if len(workers) > MOST_EXACT:
        raise ValueError(f"exact values of {len(workers)} workers take {2 ** len(workers):,} models to evaluate")
    known = _Known(utility)
    count = len(workers)
    parts: dict[str, list[float]] = {worker: [] for worker in workers}
    for number in range(2**count):
        members = frozenset(worker for bit, worker in enumerate(workers) if number >> bit & 1)
        for worker in set(workers) - members:
            chance = 1 / (count * math.comb(count - 1, len(members)))
            parts[worker].append(chance * (known(members | {worker}) - known(members)))
    return {worker: math.fsum(part) for worker, part in parts.items()}


def leave_one_out(workers: Sequence[str], utility: Utility) -> Values:
    """How much worse the model is without each worker; n + 1 utilities."""
    everybody = frozenset(workers)
    known = _Known(utility)
    return {worker: known(everybody) - known(everybody - {worker}) for worker in workers}


def gtg_shapley(
    workers: Sequence[str],
    utility: Utility,
    *,
    seed: int = 0,
    tolerance: float = 0.001,
    precision: float = 0.01,
    orders: int = 1000,
) -> Values:
    """GTG-Shapley: guided truncated Monte Carlo (Liu et al. 2022, arXiv 2109.02053, algorithm 1).

    - between rounds: a round that changes next to nothing is worth nothing to anybody (2 utilities);
    - within a round: when the workers that have come have nearly all of the utility, those to come add nothing;
    - guided: in each cycle every worker comes first once, and the others behind it in random order.

    Where we differ: the tolerances are relative to the round's whole gain (for the round itself, to the utility), so
    that they need not be set anew for each loss; cycles end when no value has moved by more than ``precision`` of the
    range of all values in two cycles in a row.

    Args:
        workers: all of them, n.
        utility: see :data:`Utility`.
        seed: of the random orders.
        tolerance: for both truncations.
        precision: when to stop.
        orders: at most about so many, in cycles of n.
    """
    everybody = frozenset(workers)
    known = _Known(utility)
    whole, nothing = known(everybody), known(frozenset())
    gain = whole - nothing
    if abs(gain) <= tolerance * 1e-3 * max(abs(nothing), abs(whole)):
        return dict.fromkeys(workers, 0.0)
    totals = dict.fromkeys(workers, 0.0)
    before: Mapping[str, float] = {}
    still = 0
    for cycle, guided in enumerate(_guided_orders(workers, seed)):
        for order in guided:
            utility_so_far, members = nothing, frozenset[str]()
            for worker in order:
                if members and abs(whole - utility_so_far) <= tolerance * abs(gain):
                    break
                members |= {worker}
                following = known(members)
                totals[worker] += following - utility_so_far
                utility_so_far = following
        count = (cycle + 1) * len(workers)
        values = {worker: total / count for worker, total in totals.items()}
        span = max(values.values()) - min(values.values())
        moved = max((abs(values[worker] - before.get(worker, math.inf)) for worker in workers), default=0.0)
        still = still + 1 if moved <= precision * span + 1e-12 * abs(gain) else 0
        before = values
        if still == 2 or count >= orders:
            return values
    raise AssertionError("orders do not end")


def _guided_orders(workers: Sequence[str], seed: int) -> Iterator[list[list[str]]]:
    """Cycles without end of n orders of n workers, each worker first in one."""
    generator = np.random.default_rng(seed)
    while True:
        orders = []
        for first in workers:
            others = [worker for worker in workers if worker != first]
            orders.append([first, *(others[i] for i in generator.permutation(len(others)))])
        yield orders


class _Known:
    """A utility whose answers are remembered."""

    def __init__(self, utility: Utility) -> None:
        self._utility = utility
        self._answers: dict[frozenset[str], float] = {}

    def __call__(self, coalition: frozenset[str]) -> float:
        if coalition not in self._answers:
            self._answers[coalition] = self._utility(coalition)
        return self._answers[coalition]


#: Name, and what values a round's workers by a utility.
METHODS: Mapping[str, Callable[[Sequence[str], Utility], Values]] = {
    "exact-shapley": exact_shapley,
    "gtg-shapley": gtg_shapley,
    "leave-one-out": leave_one_out,
}
