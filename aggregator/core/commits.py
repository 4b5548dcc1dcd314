"""Folded updates that are not yet durable, and the one checkpoint that is on its way."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

from aggregator.core.rules import CommitPolicy
from aggregator.core.snapshot import Snapshot
from aggregator.strategies.base import Accumulator
from broker.messages import UpdateId
from broker.transport import Token

__all__ = ["Commits", "Flight"]


@dataclass(slots=True)
class Held:
    """A folded update that is not yet durable."""

    tokens: list[Token]
    nbytes: int
    since: float
    """When it was first delivered on the connection that still holds it."""


@dataclass(frozen=True, slots=True)
class Flight:
    """A checkpoint on its way."""

    commit: int
    snapshot: Snapshot
    ids: frozenset[UpdateId]
    commands: frozenset[str]


@dataclass(slots=True)
class Commits:
    """At most one checkpoint is on its way; whatever is folded meanwhile waits for the next."""

    retry_at: float
    """Not before then, since the last one failed."""
    held: dict[UpdateId, Held] = field(default_factory=dict)
    flight: Flight | None = None
    lent: Accumulator | None = None
    """What the checkpoint on its way still reads from, so that nobody may write into it."""
    _number: int = 0
    # Sums over what is held: asked for at every event.
    _tokens: int = 0
    _nbytes: int = 0

    def hold(self, update: UpdateId, token: Token, nbytes: int, now: float) -> None:
        """``update`` was folded; ``token`` is acknowledged when that is durable."""
        self.held[update] = Held([token], nbytes, now)
        self._tokens += 1
        self._nbytes += nbytes

    def repeat(self, update: UpdateId, tokens: Sequence[Token]) -> None:
        """``update``, which is held, was delivered again."""
        self.held[update].tokens += tokens
        self._tokens += len(tokens)

    def forget(self, generation: int) -> None:
        """The connection of ``generation`` is gone, and its tokens with it."""
        for held in self.held.values():
            held.tokens = [token for token in held.tokens if token.generation != generation]
        self._tokens = sum(len(held.tokens) for held in self.held.values())

    def borrows(self, accumulator: Accumulator) -> bool:
        """Whether the checkpoint on its way reads from ``accumulator``, so that nobody may write into it."""
        return self.lent is accumulator

    def is_due(self, policy: CommitPolicy, now: float, *, at_once: bool) -> bool:
        """Whether to write one now: because something asks for it at once, or by count, bytes or age."""
        if self.flight is not None or now < self.retry_at:
            return False
        return at_once or (
            bool(self.held)
            and (
                self._tokens >= policy.count
                or self._nbytes >= policy.nbytes
                or now - self._oldest.since >= policy.seconds
            )
        )

    @property
    def _oldest(self) -> Held:
        """Of those that are held, of which there is one: they are in the order in which they came."""
        return next(iter(self.held.values()))

    def start(self, snapshot: Snapshot, commands: Iterable[str], *, lent: Accumulator) -> int:
        """``snapshot``, which covers all that is held and has the arrays of ``lent``, is on its way; its number."""
        self._number += 1
        self.lent = lent if snapshot.accumulator.tensors else None
        self.flight = Flight(self._number, snapshot, frozenset(self.held), frozenset(commands))
        return self._number

    def land(self, commit: int) -> Flight | None:
        """The checkpoint that was on its way, which has arrived or failed; None if it is another."""
        if self.flight is None or self.flight.commit != commit:
            return None
        flight, self.flight, self.lent = self.flight, None, None
        return flight

    def give_back(self, commit: int) -> None:
        """The checkpoint on its way reads no more from the accumulator; nothing happens if it is another."""
        if self.flight is not None and self.flight.commit == commit:
            self.lent = None
            # Nor may it keep arrays alive that the next version does not take over, as those of half precision.
            self.flight = replace(self.flight, snapshot=replace(self.flight.snapshot, accumulator=Accumulator()))

    def release(self, flight: Flight) -> list[Token]:
        """What may be acknowledged, now that ``flight`` is durable."""
        released = [self.held.pop(update) for update in sorted(flight.ids)]
        self._nbytes -= sum(held.nbytes for held in released)
        self._tokens -= sum(len(held.tokens) for held in released)
        return [token for held in released for token in held.tokens]

    def next_wake(self, policy: CommitPolicy) -> list[float]:
        """When time alone will make one due."""
        oldest = [self._oldest.since + policy.seconds] if self.held else []
        return [self.retry_at, *oldest]
