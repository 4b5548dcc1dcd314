"""Who is here. Workers come and go as they like; nothing waits for a named one."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import overload

from broker.messages import Role

__all__ = ["Member", "Present", "Roster"]

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
    farewell: str = ""
    """The reason in its goodbye."""
    incarnation: str = ""
    """The one that was heard last."""
    former: frozenset[str] = frozenset()
    """Those before it."""
    doubled: bool = False
    """Two of them were heard in turn."""
    waiting: int | None = None
    """The version whose successor it waits for."""
    waiting_since: float = 0.0


class Present(Sequence[str]):
    """The names of those who are here with one role, sorted: a picture that holds until somebody comes or leaves.

    They are sorted when that is first asked for. Whether somebody is among them takes no sorting.
    """

    __slots__ = ("_here", "_names", "_role")

    def __init__(self, here: Mapping[str, Role], role: Role) -> None:
        """``here``: everybody who is."""
        self._here, self._role = here, role
        self._names: tuple[str, ...] | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """All of them."""
        if self._names is None:
            self._names = tuple(sorted(name for name, role in self._here.items() if role is self._role))
        return self._names

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index: int | slice) -> str | tuple[str, ...]:
        return self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __contains__(self, name: object) -> bool:
        return self._here.get(name) is self._role  # type: ignore[call-overload]


class Roster:
    """Members by name; one that was silent for ``timeout`` seconds counts as gone until it is heard again.

    Who is here is asked at every event and changes seldom. Nothing here takes longer with more workers, but for the
    list of their names, which is made after somebody has come or left, and only if it is asked for.
    """

    def __init__(self, timeout: float) -> None:
        """See the class."""
        self._timeout = timeout
        self._members: dict[str, Member] = {}
        self._confirmed: dict[str, dict[str, int]] = {}
        self._here: dict[str, Role] = {}
        self._present: dict[Role, Present] = {}
        # Who was what when the news were last told, of those for whom that has changed since.
        self._before: dict[str, Role | None] = {}
        # For everybody who is here, a time before which silence cannot be too long; looked at again then.
        self._expiries: list[tuple[float, str]] = []

    @property
    def timeout(self) -> float:
        """Seconds of silence after which a member counts as gone."""
        return self._timeout

    @timeout.setter
    def timeout(self, seconds: float) -> None:
        self._timeout = seconds
        for name, member in self._members.items():
            # Who was silent for too long may not be so any more.
            if member.present:
                self._enter(name, member.role)
        self._expiries = []
        for name in self._here:
            self._expect(name)

    @property
    def members(self) -> Mapping[str, Member]:
        """All who were heard of, here or not. Not to be changed."""
        return self._members

    def restore(self, trainers: tuple[str, ...], confirmed: Mapping[str, Mapping[str, int]], now: float) -> None:
        """Take over what a checkpoint says; everybody gets a full timeout to be heard again, and is no news."""
        self._confirmed = {name: dict(by_incarnation) for name, by_incarnation in confirmed.items()}
        for name in confirmed:
            self._members[name] = Member(Role.TRAINER, now, present=False)
        for name in trainers:
            member = self._members.setdefault(name, Member(Role.TRAINER, now))
            member.present = True
            self._here[name] = member.role
            self._expect(name)

    def see(self, name: str, now: float, role: Role | None = None) -> Member:
        """``name`` was heard of."""
        member = self._members.get(name)
        if member is None:
            member = self._members[name] = Member(role or Role.TRAINER, now)
        if role is not None:
            member.role = role
        member.last_seen, member.present, member.farewell = now, True, ""
        known = self._here.get(name)
        if known is not member.role:
            self._enter(name, member.role)
            if known is None:
                self._expect(name)
        return member

    def _enter(self, name: str, role: Role) -> None:
        before = self._here.get(name)
        if before is not role:
            self._before.setdefault(name, before)
            self._here[name] = role
            self._present = {}

    def _depart(self, name: str) -> None:
        if name in self._here:
            self._before.setdefault(name, self._here.pop(name))
            self._present = {}

    def _expect(self, name: str) -> None:
        if math.isfinite(self._timeout):
            heapq.heappush(self._expiries, (self._members[name].last_seen + self._timeout, name))

    def _expire(self, now: float) -> None:
        """Whoever has been silent for too long is not here any more."""
        while self._expiries and (self._expiries[0][0] <= now or self._expiries[0][1] not in self._here):
            _, name = heapq.heappop(self._expiries)
            if name not in self._here:
                continue
            if self._members[name].last_seen + self._timeout <= now:
                self._depart(name)
            else:
                self._expect(name)

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
            member.former = frozenset({*list(member.former)[-MAX_INCARNATIONS:], member.incarnation})
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
            self._depart(name)

    def news(self, now: float) -> tuple[list[tuple[str, Role]], list[tuple[str, Role]]]:
        """Who has gone and who has come since this was last asked, with the role."""
        self._expire(now)
        if not self._before:
            return [], []
        before, self._before = self._before, {}
        went = [(name, role) for name, role in before.items() if role is not None and name not in self._here]
        came = [(name, self._here[name]) for name, role in before.items() if role is None and name in self._here]
        return went, came

    def farewell(self, name: str) -> str:
        """Why ``name`` left; empty if it did not say."""
        return self._members[name].farewell

    def confirm(self, name: str, incarnation: str, count: int) -> None:
        """``name`` says how many updates of ``incarnation`` were confirmed; counts never fall."""
        if name in self._members and count > 0:
            known = self._confirmed.setdefault(name, {})
            known[incarnation] = max(count, known.pop(incarnation, 0))
            while len(known) > MAX_INCARNATIONS:
                oldest = next(name for name in known if name != EARLIER)
                known[EARLIER] = known.get(EARLIER, 0) + known.pop(oldest)

    def present(self, role: Role, now: float) -> Present:
        """Names of those with ``role`` who are here, sorted; the same object until somebody comes or leaves."""
        self._expire(now)
        if role not in self._present:
            self._present[role] = Present(self._here, role)
        return self._present[role]

    def missing_evaluation(self, version: int, now: float) -> list[str]:
        """Evaluators who are here and have not reported on ``version``."""
        return [n for n in self.present(Role.EVALUATOR, now) if self._members[n].evaluated < version]

    def evaluated(self, name: str, version: int, now: float) -> None:
        """``name`` reported on ``version``."""
        member = self.see(name, now, Role.EVALUATOR)
        member.evaluated = max(member.evaluated, version)

    def confirmed(self) -> dict[str, dict[str, int]]:
        """Confirmed updates by worker and incarnation."""
        return {name: dict(counts) for name, counts in sorted(self._confirmed.items())}

    def next_expiry(self, now: float) -> float | None:
        """When to look again whether somebody has been silent for too long; None if nobody is here."""
        self._expire(now)
        return self._expiries[0][0] if self._expiries else None
