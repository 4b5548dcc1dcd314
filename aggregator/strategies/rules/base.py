"""What a robust rule is: a small frozen value that makes one update of all updates of a round.

Rules see the rows of a round (:class:`Rows`) in blocks of columns, or as distances between rows, so that their memory
does not depend on how many updates there are. All arithmetic is element by element or numpy's pairwise sums, never a
matrix product of the BLAS, whose bits depend on the processor and the number of threads: a version can be rebuilt bit
for bit on another machine.

Every rule takes any number of rows, also fewer than :meth:`Rule.least` says, as when a run is stopped with a buffer
that is not full: it assumes fewer bad ones then.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from aggregator.strategies.rows import Rows
from broker.messages import Array

__all__ = ["Occasion", "OfMajority", "PreAggregation", "Rule"]


@dataclass(frozen=True, slots=True)
class Occasion:
    """What a rule may go by besides the rows."""

    seed: int = 0
    """The run's."""
    version: int = 0
    """The one that the round replaces; with the seed, the source of all that has to look random."""
    previous: Array | None = None
    """The last round's aggregate, of shape (size,); None in the first round."""


class Rule(Protocol):
    """How the rows of a round become one."""

    @property
    def remembers(self) -> bool:
        """Whether it goes by the last round's aggregate, which is kept with the run's state then."""

    def least(self) -> int:
        """Rows that it needs to withstand the bad ones that it is made for."""

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        """One row of shape (size,), in the rows' dtype. ``rows`` has at least one."""


@dataclass(frozen=True, slots=True)
class OfMajority:
    """Base of pre-aggregations that make another row of each, and rely on a majority that is good."""

    byzantine: int

    def left(self, count: int) -> int:
        """All of them."""
        return count

    def least(self) -> int:
        """A majority is good."""
        return 2 * self.byzantine + 1


class PreAggregation(Protocol):
    """Rows made of rows before the rule sees them."""

    def left(self, count: int) -> int:
        """How many rows it makes of ``count``."""

    def least(self) -> int:
        """Rows that it needs itself."""

    def __call__(self, rows: Rows, occasion: Occasion) -> Rows:
        """The rows that the rule sees; they read from ``rows``."""
