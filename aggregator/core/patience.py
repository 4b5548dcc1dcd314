"""How long a round waits for its workers: when they are asked again, and when nobody is left to ask."""

from __future__ import annotations

from collections.abc import Sequence

from aggregator.core.roster import Roster
from aggregator.core.rounds import Round
from aggregator.core.rules import Rules

__all__ = ["Patience"]


class Patience:
    """Watches the open round. Times are seconds, as the round machine is told them."""

    def __init__(self, roster: Roster, now: float) -> None:
        self.roster = roster
        self.last_arrival = now
        """Of an update, whatever became of it."""
        self.ask_again_at: float | None = None

    def is_over(self, rules: Rules, round_: Round, present: Sequence[str], *, overdue: bool, now: float) -> bool:
        """Whether the workers ``present`` are to be asked again now.

        Args:
            rules: those in force.
            round_: the open round, which cannot close yet.
            present: trainers that are waited for.
            overdue: the round's deadline has passed.
            now: the time.
        """
        if (
            not overdue
            and not rules.rounds.is_stuck(round_, present)
            and not self._is_starved(rules, round_, present, now)
        ):
            self.ask_again_at = None
        elif self.ask_again_at is None:
            self.ask_again_at = now if overdue else now + rules.retry_seconds
        return self.ask_again_at is not None and now >= self.ask_again_at

    def _is_starved(self, rules: Rules, round_: Round, present: Sequence[str], now: float) -> bool:
        """Whether a worker waits for the next version, and what it was asked for never came.

        As after a queue that was deleted with updates in it. What is still on its way gets some time.
        """
        patience = rules.retry_seconds
        return now - self.last_arrival >= patience and any(
            self.roster.waited(name, round_.version) >= patience and rules.rounds.is_owed(round_, name)
            for name in present
        )

    def shortage(self, rules: Rules, round_: Round, present: Sequence[str], now: float) -> str | None:
        """Once a round: that everybody here has sent what it may and waits, and that it is not enough."""
        patience, fill = rules.retry_seconds, len(round_.entries)
        # Who is present is looked at last: to list them takes long where there are many, and those who come at the
        # start of a run come one after the other.
        if round_.is_short or not fill or now - self.last_arrival < patience or not present:
            return None
        if not all(
            self.roster.waited(name, round_.version) >= patience and not rules.rounds.is_owed(round_, name)
            for name in present
        ):
            return None
        round_.is_short = True
        counts = f"{fill} of {rules.rounds.goal(round_, present)} updates"
        text = f"{counts}, and the {len(present)} workers that are here have sent what they may"
        return f"round of version {round_.version}: {text}; it waits for more, or for a deadline"
