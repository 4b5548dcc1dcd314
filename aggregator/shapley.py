"""What each player of a cooperative game brings: Shapley's value, exactly and from samples. Knows nothing of models."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from broker.messages import Array

__all__ = ["MOST_EXACT", "Coalition", "Truncation", "exact", "guided"]

Coalition = frozenset[str]
Utility = Callable[[Coalition], float]

#: Players of whom all coalitions are looked at: 2**12 are 4,096.
MOST_EXACT = 12


@dataclass(frozen=True, slots=True)
class Truncation:
    """When to save evaluations, and when to stop."""

    between: float = 1e-4
    """A game in which all gain less than this part of the utility without anybody is not played: all bring nothing."""
    within: float = 0.02
    """Of an ordering, those who come when no more than this part of the whole gain is missing bring nothing."""
    sweeps: int = 50
    """Orderings, by players, after which it ends in any case."""
    settled: float = 0.01
    """It ends when the values of the last orderings differ by less than this from what they are now, in relation to
    the mean size of a value."""


#: Sweeps before values can count as settled, and orderings that are looked back at.
LEAST_SWEEPS = 3
LAST = 10


def exact(players: Sequence[str], utility: Utility) -> dict[str, float]:
    """Each player's mean marginal gain over all orderings (Shapley 1953), by all 2**n coalitions.

    The values add up to what all gain together. For at most :data:`MOST_EXACT` players; raises ValueError for more.
    """
    count = len(players)
    if count > MOST_EXACT:
        raise ValueError(f"{count} players have {2**count:,} coalitions; exactly for {MOST_EXACT} at most")
    known = {
        frozenset(chosen): utility(frozenset(chosen))
        for size in range(count + 1)
        for chosen in combinations(players, size)
    }
    values = {}
    for player in players:
        gains = [
            (known[coalition | {player}] - value) / (count * math.comb(count - 1, len(coalition)))
            for coalition, value in known.items()
            if player not in coalition
        ]
        values[player] = math.fsum(gains)
    return values


def guided(
    players: Sequence[str], utility: Utility, source: np.random.Generator, truncation: Truncation = Truncation()
) -> dict[str, float]:
    """GTG-Shapley of one round (Liu et al. 2021, arXiv 2109.02053, algorithm 1): guided truncated sampling.

    Orderings are drawn in sweeps: in each, every player comes first once, since who comes first gains most, and the
    others follow in random order. Gains are summed up along an ordering until hardly anything is missing (truncation
    within the round); a round that gained hardly anything is passed over (between rounds). No coalition is evaluated
    twice.

    Where we differ: thresholds are in relation to the gain, theirs are absolute; and a value counts as settled in
    relation to the mean size of all values, so that a player who brings nothing does not keep it going, and within
    0.01 of it where their code has 0.05, which leaves twenty players' values too rough to rank them.

    Args:
        players: those of the round.
        utility: of a coalition; higher is better.
        source: of the orderings.
        truncation: what is saved.
    """
    known: dict[Coalition, float] = {}

    def value(coalition: Coalition) -> float:
        if coalition not in known:
            known[coalition] = utility(coalition)
        return known[coalition]

    nobody, all_ = value(frozenset()), value(frozenset(players))
    gain = all_ - nobody
    count = len(players)
    if not players or abs(gain) <= truncation.between * abs(nobody):
        return dict.fromkeys(players, 0.0)
    sums, seen = dict.fromkeys(players, 0.0), 0
    means: list[Array] = []
    for sweep in range(truncation.sweeps):
        for first in range(count):
            others = source.permutation([index for index in range(count) if index != first])
            order = [players[index] for index in (first, *others.tolist())]
            for player, more in _gains(order, value, all_, truncation.within * abs(gain)):
                sums[player] += more
            seen += 1
            means.append(np.array([sums[player] / seen for player in players]))
        if sweep + 1 >= LEAST_SWEEPS and _is_settled(means[-LAST:], truncation.settled):
            break
    return dict(zip(players, means[-1].tolist(), strict=True))


def _gains(order: Sequence[str], value: Utility, all_: float, missing: float) -> Iterator[tuple[str, float]]:
    """What each adds who comes before no more than ``missing`` is missing."""
    coalition: Coalition = frozenset()
    before = value(coalition)
    for player in order:
        if abs(all_ - before) <= missing:
            return
        coalition |= {player}
        now = value(coalition)
        yield player, now - before
        before = now


def _is_settled(means: Sequence[Array], tolerance: float) -> bool:
    now = means[-1]
    scale = float(np.abs(now).mean())
    return max(float(np.abs(then - now).mean()) for then in means) <= tolerance * scale
