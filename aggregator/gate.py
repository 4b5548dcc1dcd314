"""The gate: what is refused before anybody reads it, so that whoever floods takes next to no time from the others.

A message is judged by the account that sent it, for which the broker vouches: so it is never the worker in whose name
somebody speaks that answers for it. What is refused here is neither decoded nor kept: it is counted, and told in sums.
The aggregator's own account and the trusted ones are not judged, since they stand for many; what nobody vouches for is
judged together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.allowance import BAD, LATE, REPEATED, STALLED, Allowances, Limit
from aggregator.core.standing import BLAMED
from aggregator.intake import UNREAD, Unread
from aggregator.senders import Senders
from broker.messages import Reason
from broker.transport import Delivery, Token

__all__ = ["Gate", "GateLimits", "too_large"]

#: Seconds of its rate that a worker may send at once.
BURST_SECONDS = 10.0
#: Hellos, heartbeats and events of one account, which sends one in seconds.
ASIDE = Limit(1000.0, 100.0)
#: Between two reports.
TELL_SECONDS = 1.0
#: Accounts that are told of by name; the others are told of as one.
MOST_TOLD = 100

#: What nobody who means well sends again and again. Of a worker in quarantine, the first are kept as any other's.
NO_USE = (BLAMED - {Reason.TOO_MANY}) | {
    Reason.BAD_SIGNATURE,
    Reason.NO_USER,
    Reason.NOT_SIGNED,
    Reason.QUARANTINED,
    Reason.UNKNOWN_FORMAT,
    Reason.WRONG_RUN,
}

TOO_BAD = f"more than {BAD.burst:.0f} of its messages were no use lately; until one a second is, no more is read"
TOO_TALKATIVE = f"more than {ASIDE.rate:.0f} hellos and events a second, with {ASIDE.burst:.0f} at once"


@dataclass(frozen=True, slots=True)
class GateLimits:
    """What an operator has set for each worker; None for no limit."""

    updates_per_second: float | None = None
    bytes_per_second: float | None = None


class Gate:
    """All accounts' allowances."""

    def __init__(
        self, limits: GateLimits, now: Callable[[], float], unread: Callable[[], Unread] = Counter[str]
    ) -> None:
        """``now`` gives seconds that never fall, and ``unread`` what was left out before it came here."""
        self._now = now
        self._unread = unread
        self._bad = Allowances(BAD)
        self._aside = Allowances(ASIDE)
        self._limited = [
            (
                Allowances(Limit(rate * BURST_SECONDS, rate)),
                counts_bytes,
                f"aggregator.worker_{name}_per_second = {rate:g}",
            )
            for rate, counts_bytes, name in (
                (limits.updates_per_second, False, "updates"),
                (limits.bytes_per_second, True, "bytes"),
            )
            if rate is not None
        ]
        self._shut: dict[str, Counter[str]] = {}
        self._told = 0.0

    def is_shut(self, delivery: Delivery, senders: Senders) -> bool:
        """Whether an update is refused unread, which is counted."""
        who, now = delivery.user, self._now()
        if senders.speaks_for_all(who) or delivery.chunks is not None or delivery.lost:  # these were let in
            return False
        if not self._bad.has_any(who, now):
            return self._count(who, TOO_BAD)
        for allowances, _, limit in self._limited:
            if not allowances.has_any(who, now):
                return self._count(who, f"{limit}, and ten times that at once")
        for allowances, counts_bytes, _ in self._limited:
            allowances.spend(who, float(_size(delivery)) if counts_bytes else 1.0, now)
        return False

    def is_shut_aside(self, delivery: Delivery, senders: Senders) -> bool:
        """The same for a hello, a goodbye or an event. Operators' commands are always read."""
        who, now = delivery.user, self._now()
        if delivery.token is not None or senders.speaks_for_all(who):
            return False
        if not self._aside.has_any(who, now):
            return self._count(who, TOO_TALKATIVE)
        self._aside.spend(who, 1.0, now)
        return False

    def note(self, fact: do.Fact, _version: int) -> None:
        """The round machine has found something to be of no use. An account is called as its worker."""
        match fact:
            case do.Rejected(worker, Reason.INCOMPLETE):
                self._bad.spend(worker, STALLED, self._now())
            case do.Rejected(worker, reason) if reason in NO_USE:
                self._bad.spend(worker, 1.0, self._now())
            case do.Rejected(worker, reason) if reason not in {Reason.TOO_MANY, Reason.RUN_DONE}:
                self._bad.spend(worker, LATE, self._now())
            case do.Repeated(update):
                self._bad.spend(update.worker, REPEATED, self._now())

    def not_looked_for(self, delivery: Delivery, senders: Senders) -> str:
        """Why the chunks of an update that was let in are not even looked for by now; empty if they are."""
        who = delivery.user
        is_barred = not senders.speaks_for_all(who) and not self._bad.has_any(who, self._now())
        return "its chunks were not looked for: too much of its worker's was no use lately" if is_barred else ""

    def due(self, *, at_once: bool = False) -> Iterator[on.Shut]:
        """What was refused since the last time, about once a second, or ``at_once``."""
        now = self._now()
        for who, count in self._unread().items():
            self._count(who, UNREAD, count)
        if not self._shut or not (at_once or now - self._told >= TELL_SECONDS):
            return
        self._told = now
        shut, self._shut = self._shut, {}
        for who, counts in shut.items():
            for detail, count in counts.items():
                yield on.Shut(who, Reason.TOO_MANY, detail, count)

    def _count(self, who: str, detail: str, count: int = 1) -> bool:
        name = who if who in self._shut or len(self._shut) < MOST_TOLD else ""
        self._shut.setdefault(name, Counter())[detail] += count
        return True


def too_large(token: Token, delivery: Delivery, largest: int) -> on.Unreadable | None:
    """What becomes of an update that has more than ``largest`` bytes, before anything of it is read."""
    if delivery.nbytes <= largest:
        return None
    detail = f"{delivery.nbytes} bytes; no update of this model has more than {largest}"
    return on.Unreadable(token, Reason.TOO_LARGE, detail, delivery.user)


def _size(delivery: Delivery) -> int:
    """Bytes of an update, its chunks included, as far as its headers say so."""
    announced = delivery.headers.get("bytes", 0)
    return delivery.nbytes + (announced if isinstance(announced, int) and announced > 0 else 0)
