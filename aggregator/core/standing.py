"""How workers stand: a score that bad updates raise and time lowers, and who is in quarantine for it.

What is known of a worker is kept only while it is not the best: thousands of workers without a fault take no room in
the checkpoints.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from broker.messages import Reason

__all__ = ["BLAMED", "QuarantinePolicy", "Standing", "Standings"]

#: Rejections that lie in what a worker sent, and not in when, or in the network between.
BLAMED = frozenset(
    {
        Reason.MALFORMED,
        Reason.MODEL_MISMATCH,
        Reason.NO_EXAMPLES,
        Reason.NORM_TOO_LARGE,
        Reason.NORM_UNUSUAL,
        Reason.NOT_FINITE,
        Reason.TOO_LARGE,
        Reason.TOO_MANY,
        Reason.TOO_MANY_EXAMPLES,
        Reason.WRONG_USER,
    }
)

#: A lower score is forgotten.
LEAST_SCORE = 0.01

#: Workers of whom something is known; beyond, who has been known longest is forgotten, unless it is in quarantine.
MOST = 10_000


@dataclass(frozen=True, slots=True)
class QuarantinePolicy:
    """When a worker's updates are not taken any more, and again."""

    score: float | None = None
    """Above it; None for never."""
    seconds: float = 3600.0
    """For how long."""
    half_life: int = 20
    """Versions in which a score falls to one half."""


@dataclass(frozen=True, slots=True)
class Standing:
    """What is held against one worker."""

    score: float = 0.0
    version: int = 0
    """When the score was this."""
    until: float | None = None
    """In quarantine up to this time, seconds since 1970; None if it is not."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Its rejected updates, by reason."""


class Standings:
    """All workers' standings, by name."""

    def __init__(self, policy: QuarantinePolicy, standings: Mapping[str, Standing]) -> None:
        """As a checkpoint has them."""
        self.policy = policy
        self._standings = dict(standings)
        self._kept_out = {name: s.until for name, s in standings.items() if s.until is not None}

    def score(self, worker: str, version: int) -> float:
        """The score of ``worker`` when ``version`` is the newest."""
        known = self._standings.get(worker)
        return 0.0 if known is None else known.score * 0.5 ** ((version - known.version) / self.policy.half_life)

    @property
    def workers(self) -> Collection[str]:
        """Those of whom something is known."""
        return self._standings.keys()

    def rejected(self, worker: str) -> Mapping[str, int]:
        """Rejected updates of ``worker``, by reason."""
        known = self._standings.get(worker)
        return {} if known is None else known.rejected

    def until(self, worker: str) -> float | None:
        """When ``worker``'s quarantine ends; None if it is in none."""
        return self._kept_out.get(worker)

    @property
    def kept_out(self) -> Mapping[str, float]:
        """Workers in quarantine, and until when."""
        return self._kept_out

    def reject(self, worker: str, reason: Reason, version: int, now: float) -> float | None:
        """Count a rejection; the end of the quarantine that begins with it, or None."""
        known = self._standings.get(worker, Standing(version=version))
        self._make_room()
        counts = {**known.rejected, reason.value: known.rejected.get(reason.value, 0) + 1}
        self._standings[worker] = replace(known, rejected=counts)
        return self.blame(worker, 1.0 if reason in BLAMED else 0.0, version, now)

    def blame(self, worker: str, points: float, version: int, now: float) -> float | None:
        """Add ``points``; the end of the quarantine that begins with them, or None."""
        if points <= 0:
            return None
        score = self.score(worker, version) + points
        until = self.until(worker)
        limit = self.policy.score
        begins = limit is not None and score > limit and until is None
        if begins:
            until = self._kept_out[worker] = now + self.policy.seconds
        known = self._standings.get(worker, Standing())
        self._make_room()
        self._standings[worker] = replace(known, score=score, version=version, until=until)
        return until if begins else None

    def release(self, worker: str, version: int) -> bool:
        """Take ``worker`` out of quarantine, on half of the score that leads there; False if it is in none."""
        if self._kept_out.pop(worker, None) is None:
            return False
        score = min(self.score(worker, version), (self.policy.score or 0.0) / 2)
        self._standings[worker] = replace(self._standings[worker], score=score, version=version, until=None)
        return True

    def release_due(self, version: int, now: float) -> list[str]:
        """Take those out whose time is over, and name them."""
        due = sorted(name for name, until in self._kept_out.items() if until <= now)
        for name in due:
            self.release(name, version)
        return due

    def next_release(self) -> float | None:
        """When somebody's time is over; None if nobody is in quarantine."""
        return min(self._kept_out.values(), default=None)

    def _make_room(self) -> None:
        if len(self._standings) > MOST:
            self._standings.pop(next((name for name in self._standings if name not in self._kept_out), ""), None)

    def to_plain(self, version: int) -> dict[str, Standing]:
        """Those that are to be kept."""
        return {
            name: standing
            for name, standing in sorted(self._standings.items())
            if standing.rejected or standing.until is not None or self.score(name, version) >= LEAST_SCORE
        }
