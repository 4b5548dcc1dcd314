"""The layer before any rule: what is taken is usual in size and comes from a worker in good standing."""

from __future__ import annotations

from aggregator.core import effects as do
from aggregator.core.norms import NormWindow
from aggregator.core.rules import Rules
from aggregator.core.screen import measured
from aggregator.core.snapshot import Snapshot
from aggregator.core.standing import Standings
from broker.messages import Reason, Update

__all__ = ["Screening"]


class Screening:
    """The norms of what has come, how workers stand, and what follows from both."""

    def __init__(self, rules: Rules, snapshot: Snapshot) -> None:
        """As ``snapshot`` has them."""
        self.limits = rules.norms
        self.norms = NormWindow(snapshot.worker_norms)
        self.standings = Standings(rules.quarantine, snapshot.standings)
        self.has_news = False
        """Whether a quarantine began or ended that no checkpoint on its way to the disk has."""

    def use(self, rules: Rules) -> None:
        """Go by ``rules`` from now on."""
        self.limits, self.standings.policy = rules.norms, rules.quarantine

    def refusal(self, worker: str, now: float) -> tuple[Reason, str] | None:
        """Why nothing of ``worker`` is taken, or None."""
        until = self.standings.until(worker)
        if until is None:
            return None
        return Reason.QUARANTINED, _remaining(worker, until, now)

    def judge(self, update: Update) -> tuple[Reason, str] | float | None:
        """Why the values of ``update`` are not taken, or its norm; None if that is neither known nor needed."""
        norm = measured(update, needs_norm=self.limits.any)
        if not isinstance(norm, float):
            return norm
        usual = self.norms.median
        self.norms.add(update.id.worker, norm)
        return self.limits.refusal(norm, usual) or norm

    def reject(self, worker: str, reason: Reason, version: int, now: float) -> list[do.Effect]:
        """An update of ``worker`` was rejected."""
        return self._told(worker, self.standings.reject(worker, reason, version, now), version, now)

    def blame(self, worker: str, points: float, version: int, now: float) -> list[do.Effect]:
        """An update of ``worker`` that was taken is worth so many points."""
        return self._told(worker, self.standings.blame(worker, points, version, now), version, now)

    def release(self, worker: str, version: int) -> list[do.Effect]:
        """An operator wants ``worker`` out of quarantine."""
        if not self.standings.release(worker, version):
            return []
        self.has_news = True
        return [do.Record(do.Released(worker, version))]

    def release_due(self, version: int, now: float) -> list[do.Effect]:
        """What time alone ends."""
        due = self.standings.release_due(version, now)
        self.has_news |= bool(due)
        return [do.Record(do.Released(worker, version)) for worker in due]

    def _told(self, worker: str, until: float | None, version: int, now: float) -> list[do.Effect]:
        """What follows from a quarantine that has begun, if ``until`` says that one has."""
        if until is None:
            return []
        self.has_news = True
        # It may send nothing more that could be rejected: it waits for a version that others make.
        tell = do.Tell(worker, Reason.QUARANTINED, _remaining(worker, until, now))
        return [tell, do.Record(do.Quarantined(worker, version, self.standings.score(worker, version), until))]


def _remaining(worker: str, until: float, now: float) -> str:
    return f"{worker} is in quarantine for {max(0.0, until - now):.0f} s more"
