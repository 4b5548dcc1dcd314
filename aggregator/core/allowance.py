"""What one account may send before it is refused unread: token buckets, as pure state.

A bucket holds so many tokens and gets so many a second (Turner 1986); what finds none is over the allowance. One for
messages, one for bytes, if the operator has set limits, and one for what was bad, which everybody has: a worker that
means well rests after a rejection and never empties it.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

__all__ = ["BAD", "LATE", "MOST", "REPEATED", "STALLED", "Allowances", "Bucket", "Limit"]

#: Accounts of which anything is known; beyond, who was heard longest ago is forgotten.
MOST = 10_000
#: What an update costs that came before. A thousand may come at once when an aggregator has taken over.
REPEATED = 0.1
#: What an update costs that came too late, or was one too many: a worker that means well has some, if it is fast.
LATE = 0.02
#: What an update costs whose chunks are not there: everybody's next update waits while they are looked for.
STALLED = 20.0


@dataclass(frozen=True, slots=True)
class Limit:
    """So many at once, and so many a second in the long run."""

    burst: float
    rate: float


#: Messages that are no use.
BAD = Limit(100.0, 1.0)


@dataclass(slots=True)
class Bucket:
    """What is left of one limit."""

    tokens: float
    at: float

    def refill(self, limit: Limit, now: float) -> None:
        """Time has gone by until ``now``."""
        self.tokens = min(limit.burst, self.tokens + limit.rate * max(0.0, now - self.at))
        self.at = now


class Allowances:
    """One limit for each of many accounts."""

    def __init__(self, limit: Limit) -> None:
        """Everybody begins with all of ``limit``'s burst."""
        self.limit = limit
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()

    def has_any(self, who: str, now: float) -> bool:
        """Whether ``who`` has anything left, or gets to have: a whole token, or what the limit holds at most."""
        bucket = self._buckets.get(who)
        if bucket is None:
            return True
        bucket.refill(self.limit, now)
        return bucket.tokens >= min(1.0, self.limit.burst)

    def spend(self, who: str, tokens: float, now: float) -> None:
        """``who`` has used so many; no more than a burst is owed."""
        bucket = self._buckets.pop(who, None) or Bucket(self.limit.burst, now)
        bucket.refill(self.limit, now)
        bucket.tokens = max(bucket.tokens - tokens, -self.limit.burst)
        self._buckets[who] = bucket
        if len(self._buckets) > MOST:
            self._buckets.popitem(last=False)
