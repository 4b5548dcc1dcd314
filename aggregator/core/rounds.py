"""When a round takes an update, and when it closes. Small frozen values; one class a kind of round."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from typing import Protocol

from aggregator.core.snapshot import Entry
from broker.messages import Plan, Reason, Rounds, UpdateHead

__all__ = ["Buffered", "Round", "RoundRule", "Synchronous"]


@dataclass(slots=True)
class Round:
    """What is known of the round that is open."""

    version: int
    """The version that it will replace."""
    opened: float
    plan: Plan
    entries: list[Entry] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)
    """Workers whose answer to this attempt was rejected."""
    draws: dict[tuple[int, str], bool] = field(default_factory=dict)
    """Who was sampled, by question and worker, as far as that was asked."""
    is_short: bool = False
    """Whether it was said that there are too few workers to fill it."""
    # Asked for at every event, and with thousands of workers too long to be made each time.
    _folded: Counter[str] = field(default_factory=Counter)
    _counted: int = 0
    _expected: tuple[Sequence[str], Plan, frozenset[str]] | None = None

    @property
    def folded(self) -> AbstractSet[str]:
        """Workers with an update in the buffer, which only ever grows."""
        while self._counted < len(self.entries):
            self._folded[self.entries[self._counted].id.worker] += 1
            self._counted += 1
        return self._folded.keys()

    def count(self, worker: str) -> int:
        """Updates of ``worker`` in the buffer."""
        return self._folded[worker] if worker in self.folded else 0

    def expected(self, present: Sequence[str]) -> AbstractSet[str]:
        """Those of ``present`` who take part; it must not change as long as it is the same object."""
        if self._expected is None or self._expected[0] is not present or self._expected[1] is not self.plan:
            drawn = frozenset(worker for worker in present if self.is_sampled(worker))
            self._expected = present, self.plan, drawn
        return self._expected[2]

    def is_sampled(self, worker: str) -> bool:
        """Whether ``worker`` takes part: the plan's draw, which takes a hash, made once."""
        key = self.plan.asked, worker
        if key not in self.draws:
            self.draws[key] = self.plan.is_sampled(worker, self.version)
        return self.draws[key]


class RoundRule(Protocol):
    """A kind of round."""

    def plan(self, base: Plan) -> Plan:
        """What workers are asked for."""

    def refusal(self, round_: Round, head: UpdateHead) -> tuple[Reason, str] | None:
        """Why this round does not take an update, or None."""

    def is_complete(self, round_: Round, present: Sequence[str]) -> bool:
        """Whether the round closes now, deadlines apart."""

    def goal(self, round_: Round, present: Sequence[str]) -> int:
        """Updates at which it closes, as far as is known."""

    def is_stuck(self, round_: Round, present: Sequence[str]) -> bool:
        """Whether the round cannot complete unless workers are asked again."""

    def is_owed(self, round_: Round, worker: str) -> bool:
        """Whether ``worker`` was asked for more than has come from it."""

    @property
    def minimum(self) -> int:
        """Updates that a deadline needs to close the round."""

    @property
    def deadline(self) -> float | None:
        """Seconds after which the round closes with fewer, None for never."""


@dataclass(frozen=True, slots=True)
class Buffered:
    """Closes at ``size`` updates, whoever sent them (FedBuff)."""

    size: int
    max_staleness: int
    minimum: int = 1
    deadline: float | None = None
    updates_per_version: int | None = None
    one_per_worker: bool = False
    most_per_worker: int | None = None
    """Updates of one worker in a buffer; None for any number."""
    weight: Callable[[int], float] | None = None
    """Of a staleness. What it gives no weight is too stale."""

    def plan(self, base: Plan) -> Plan:
        """Everybody trains all the time. Unless that is not wanted, a single worker can fill the buffer by itself."""
        most = min(self.updates_per_version or self.size, self._most)
        return replace(base, rounds=Rounds.BUFFERED, updates_per_version=most)

    def refusal(self, round_: Round, head: UpdateHead) -> tuple[Reason, str] | None:
        """Too stale, or more of one worker than the buffer takes."""
        staleness = round_.version - head.base_version
        if staleness > self.max_staleness:
            return Reason.TOO_STALE, f"staleness {staleness}; aggregator.max_staleness is {self.max_staleness}"
        if self.one_per_worker and head.id.worker in round_.folded:
            text = f"{head.id.worker} has an update in the buffer; with aggregator.one_per_worker it takes"
            return Reason.SECOND_IN_ROUND, f"{text} {self.size} workers to fill it"
        if self.weight is not None and not self.weight(staleness):
            return Reason.TOO_STALE, f"staleness {staleness}, to which aggregator.staleness gives no weight"
        if self.most_per_worker is not None and round_.count(head.id.worker) >= self.most_per_worker:
            most = f"{self.most_per_worker} of {self.size} updates in the buffer are {head.id.worker}'s"
            return Reason.WORKER_SHARE, f"{most}; aggregator.worker_share allows no more"
        return None

    @property
    def _most(self) -> int:
        """Updates of one worker that a buffer takes, or if it takes any number, more than matters."""
        return 1 if self.one_per_worker else self.most_per_worker or max(self.size, self.updates_per_version or 0)

    def is_complete(self, round_: Round, present: Sequence[str]) -> bool:
        """The buffer is full."""
        del present
        return len(round_.entries) >= self.size

    def goal(self, round_: Round, present: Sequence[str]) -> int:
        """The buffer's size."""
        del round_, present
        return self.size

    def is_stuck(self, round_: Round, present: Sequence[str]) -> bool:
        """Workers go on by themselves, but one whose update was rejected may have none left for this version."""
        # Whose share of the buffer is used up can only wait for the others.
        return any(worker in present and round_.count(worker) < self._most for worker in round_.refused)

    def is_owed(self, round_: Round, worker: str) -> bool:
        """It may send more from this version."""
        sent = sum(e.id.worker == worker and e.base_version == round_.version for e in round_.entries)
        return sent < round_.plan.updates_per_version and round_.count(worker) < self._most


@dataclass(frozen=True, slots=True)
class Synchronous:
    """Closes when every sampled worker that is here has answered, or at the deadline with ``minimum``."""

    fraction: float = 1.0
    minimum: int = 1
    deadline: float | None = None

    def plan(self, base: Plan) -> Plan:
        """One update from each sampled worker."""
        return replace(base, rounds=Rounds.SYNCHRONOUS, fraction=self.fraction, updates_per_version=1)

    def refusal(self, round_: Round, head: UpdateHead) -> tuple[Reason, str] | None:
        """Of another round, or not the worker's first."""
        if head.base_version != round_.version:
            return Reason.ROUND_CLOSED, f"the round of version {head.base_version} has closed; {round_.version} is open"
        if head.id.worker in round_.folded:
            return Reason.SECOND_IN_ROUND, f"{head.id.worker} has an update in the round of version {round_.version}"
        return None

    def expected(self, round_: Round, present: Sequence[str]) -> AbstractSet[str]:
        """Workers here that were sampled."""
        return round_.expected(present)

    def is_complete(self, round_: Round, present: Sequence[str]) -> bool:
        """All have answered, and enough of the answers were good."""
        return len(round_.entries) >= self.minimum and self._have_answered(round_, present)

    def goal(self, round_: Round, present: Sequence[str]) -> int:
        """Those sampled, and no fewer than the minimum."""
        return max(self.minimum, len(self.expected(round_, present) | round_.folded))

    def is_stuck(self, round_: Round, present: Sequence[str]) -> bool:
        """Too few have answered, nobody who was sampled is left, and asking again can help.

        It can if answers were rejected or if the draw left someone out. If everybody here has answered well,
        only more workers can help, and they are waited for.
        """
        if len(round_.entries) >= self.minimum or not self._have_answered(round_, present):
            return False
        return any(worker in present for worker in round_.refused) or any(
            worker not in round_.folded for worker in present
        )

    def is_owed(self, round_: Round, worker: str) -> bool:
        """It was sampled and has not answered."""
        return round_.is_sampled(worker) and worker not in round_.folded and worker not in round_.refused

    def _have_answered(self, round_: Round, present: Sequence[str]) -> bool:
        expected = self.expected(round_, present)
        if len(round_.folded) + len(round_.refused) < len(expected):
            return False  # seen at once, and nearly always so
        return expected <= round_.folded | round_.refused
