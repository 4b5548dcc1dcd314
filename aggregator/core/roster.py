"""Who is here. Workers come and go as they like; nothing waits for a named one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from broker.messages import Role

__all__ = ["Member", "Roster"]

#: Incarnations of one worker whose counts are kept; they are for the summary alone.
MAX_INCARNATIONS = 100

#: Where the counts of older ones are added up. No incarnation's name: those have no blanks.
EARLIER = "earlier ones"


@dataclass(slots=True)
class Member:
    """A worker that was heard of."""

    role: Role
    last_seen: float
    present: bool = True
    evaluated: int = -1
    """Newest version that this evaluator has reported on."""
    confirmed: dict[str, int] = field(default_factory=dict)
    """Updates that it knows to be confirmed, by incarnation."""
    farewell: str = ""
    """The reason in its goodbye."""
    incarnation: str = ""
    """The one that was heard last."""
    former: set[str] = field(default_factory=set)
    """Those before it."""
    doubled: bool = False
    """Two of them were heard in turn."""
    waiting: int | None = None
    """The version whose successor it waits for."""
    waiting_since: float = 0.0


class Roster:
    """Members by name; one that was silent for ``timeout`` seconds counts as gone until it is heard again.

    Who is here is asked at every event and changes seldom. So the answer is kept until somebody comes or leaves,
    or until the first could be gone for silence: with thousands of workers a look at each would take longer than
    all the rest.
    """

    def __init__(self, timeout: float) -> None:
        """See the class."""
        self._timeout = timeout
        self._members: dict[str, Member] = {}
        self._here: dict[str, Role] = {}
        self._by_role: dict[Role, list[str]] = {}
        self._good_until = -math.inf

    @property
    def timeout(self) -> float:
        """Seconds of silence after which a member counts as gone."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = seconds
        self._good_until = -math.inf

    def restore(self, trainers: tuple[str, ...], confirmed: Mapping[str, Mapping[str, int]], now: float) -> None:
        """Take over what a checkpoint says; everybody gets a full timeout to be heard again."""
        for name, by_incarnation in confirmed.items():
            self._members[name] = Member(Role.TRAINER, now, present=False, confirmed=dict(by_incarnation))
        for name in trainers:
            member = self._members.setdefault(name, Member(Role.TRAINER, now))
            member.present = True
        self._good_until = -math.inf

    def see(self, name: str, now: float, role: Role | None = None) -> Member:
        """``name`` was heard of."""
        member = self._members.get(name)
        if member is None:
            member = self._members[name] = Member(role or Role.TRAINER, now)
        if role is not None:
            member.role = role
        member.last_seen, member.present, member.farewell = now, True, ""
        if self._here.get(name) is not member.role:
            self._good_until = -math.inf
        return member

    def note(self, name: str, now: float) -> None:
        """An update of ``name`` came. It may have been on its way when the worker left, so it revives nobody."""
        if name not in self._members or self._members[name].present:
            self.see(name, now)

    def is_doubled(self, name: str, incarnation: str) -> bool:
        """Note whose heartbeat it was; True, once, if a former incarnation of ``name`` is heard again.

        A worker that was started anew never comes back as what it was: there are two with this name.
        """
        member = self._members[name]
        if incarnation == member.incarnation:
            return False
        is_new = incarnation in member.former and not member.doubled
        member.doubled = member.doubled or is_new
        if member.incarnation:
            member.former = {*list(member.former)[-MAX_INCARNATIONS:], member.incarnation}
        member.incarnation = incarnation
        return is_new

    def wait(self, name: str, version: int | None, now: float) -> None:
        """``name`` says that it waits for the successor of ``version``, or, with None, that it does not wait."""
        member = self._members[name]
        if version != member.waiting:
            member.waiting, member.waiting_since = version, now

    def waited(self, name: str, version: int) -> float:
        """For how many seconds ``name`` has been saying that it waits for the successor of ``version``."""
        member = self._members[name]
        return member.last_seen - member.waiting_since if member.waiting == version else 0.0

    def leave(self, name: str, now: float, farewell: str) -> None:
        """``name`` said goodbye."""
        if name in self._members:
            self._members[name].last_seen = now
            self._members[name].present = False
            self._members[name].farewell = farewell or "left"
            self._good_until = -math.inf

    def here(self, now: float) -> Mapping[str, Role]:
        """Everybody who is here, with the role. A new dictionary whenever that has changed."""
        if now >= self._good_until:
            here = [(n, m) for n, m in self._members.items() if m.present and now - m.last_seen < self._timeout]
            self._here = {name: member.role for name, member in here}
            self._by_role = {role: sorted(n for n, own in self._here.items() if own is role) for role in Role}
            self._good_until = min((member.last_seen + self._timeout for _, member in here), default=math.inf)
        return self._here

    def farewell(self, name: str) -> str:
        """Why ``name`` left; empty if it did not say."""
        return self._members[name].farewell

    def confirm(self, name: str, incarnation: str, count: int) -> None:
        """``name`` says how many updates of ``incarnation`` were confirmed; counts never fall."""
        if name in self._members and count > 0:
            known = self._members[name].confirmed
            known[incarnation] = max(count, known.pop(incarnation, 0))
            while len(known) > MAX_INCARNATIONS:
                oldest = next(name for name in known if name != EARLIER)
                known[EARLIER] = known.get(EARLIER, 0) + known.pop(oldest)

    def present(self, role: Role, now: float) -> list[str]:
        """Names of those with ``role`` who are here, sorted. Not to be changed."""
        self.here(now)
        return self._by_role[role]

    def missing_evaluation(self, version: int, now: float) -> list[str]:
        """Evaluators who are here and have not reported on ``version``."""
        return [n for n in self.present(Role.EVALUATOR, now) if self._members[n].evaluated < version]

    def evaluated(self, name: str, version: int, now: float) -> None:
        """``name`` reported on ``version``."""
        member = self.see(name, now, Role.EVALUATOR)
        member.evaluated = max(member.evaluated, version)

    def confirmed(self) -> dict[str, dict[str, int]]:
        """Confirmed updates by worker and incarnation."""
        return {name: dict(m.confirmed) for name, m in sorted(self._members.items()) if m.confirmed}

    def next_expiry(self, now: float) -> float | None:
        """When to look again whether somebody has been silent for too long; None if nobody is here."""
        self.here(now)
        return self._good_until if math.isfinite(self._good_until) else None
