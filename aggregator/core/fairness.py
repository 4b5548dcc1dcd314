"""Weights by the inverse of how often a worker's updates come, so that fast ones do not decide alone what is learned.

Of the last updates that were folded, this one included, n are there, of m workers, and c of this worker. Its weight is
multiplied by

    n / (m c)

which is what every worker would have at equal rates, 1 / m, through what this one has, c / n. The mean of the factors
over the window is 1, so the steps are as long as without. That is the correction of Fraboni et al.
(2023, arXiv 2206.10189), who divide a worker's weight by the probability of its updates, with rates that are counted.
Where we differ: no factor is above a limit, lest a worker that was away for long makes one enormous step.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["MOST", "Fairness", "Rates"]

#: No factor is above it.
MOST = 10.0


@dataclass(frozen=True, slots=True)
class Fairness:
    """Whether, and by how many updates, rates are told."""

    window: int = 0
    """Updates; 0 weighs none by its worker's rate."""
    limit: float = MOST
    """No factor is above it."""


class Rates:
    """Whose the last updates were."""

    def __init__(self, recent: Iterable[str] = ()) -> None:
        """``recent`` as a checkpoint has them, in the order in which they came."""
        self._recent = deque(recent)
        self._counts = Counter(self._recent)

    def factor(self, worker: str, fairness: Fairness) -> float:
        """On the weight of the next update, if it is of ``worker``."""
        while len(self._recent) > max(0, fairness.window - 1):
            oldest = self._recent.popleft()
            self._counts[oldest] -= 1
            if not self._counts[oldest]:
                del self._counts[oldest]
        if not fairness.window:
            return 1.0
        own = self._counts[worker] + 1
        return min(fairness.limit, (len(self._recent) + 1) / (len(self._counts.keys() | {worker}) * own))

    def add(self, worker: str, fairness: Fairness) -> None:
        """An update of ``worker`` is folded."""
        if fairness.window:
            self._recent.append(worker)
            self._counts[worker] += 1

    def to_plain(self) -> tuple[str, ...]:
        """What :class:`Rates` is made from."""
        return tuple(self._recent)
