"""Who is here, against the simplest way of finding out: to look at everybody."""

from __future__ import annotations

import random

import pytest

from aggregator.core.roster import Roster
from broker.messages import Role

TIMEOUT = 5.0


class Plain:
    """What :class:`Roster` is to be: members as (role, last seen, present)."""

    def __init__(self) -> None:
        self.members: dict[str, tuple[Role, float, bool]] = {}
        self.timeout = TIMEOUT

    def here(self, now: float) -> dict[str, Role]:
        return {n: role for n, (role, seen, is_here) in self.members.items() if is_here and seen + self.timeout > now}


@pytest.mark.parametrize("seed", range(20))
def test_it_says_what_a_look_at_everybody_would(seed: int) -> None:
    draw, roster, plain, now = random.Random(seed), Roster(TIMEOUT), Plain(), 0.0
    known: dict[str, Role] = {}
    for _ in range(300):
        now += draw.choice([0.0, 0.5, 2.0, 6.0])
        name, role = f"w{draw.randrange(8)}", draw.choice([Role.TRAINER, Role.TRAINER, Role.EVALUATOR])
        match draw.randrange(5):
            case 0 | 1:
                roster.see(name, now, role)
                plain.members[name] = role, now, True
            case 2:
                roster.note(name, now)
                was, _, is_present = plain.members.get(name, (Role.TRAINER, 0.0, True))
                if is_present:
                    plain.members[name] = was, now, True
            case 3 if name in plain.members:
                roster.leave(name, now, "")
                plain.members[name] = plain.members[name][0], now, False
            case 4 if draw.random() < 0.2:
                roster.timeout = plain.timeout = draw.choice([3.0, TIMEOUT, float("inf")])
        here = plain.here(now)
        went, came = roster.news(now)
        assert sorted(went) == sorted((n, r) for n, r in known.items() if n not in here)
        assert sorted(came) == sorted((n, r) for n, r in here.items() if n not in known)
        known = here
        for kind in Role:
            expected = sorted(n for n, r in here.items() if r is kind)
            present = roster.present(kind, now)
            assert list(present) == expected
            assert [n for n in plain.members if n in present] == [n for n in plain.members if n in expected]
            assert present is roster.present(kind, now)
        expiry = roster.next_expiry(now)
        due = min((plain.members[n][1] + plain.timeout for n in here), default=float("inf"))
        assert expiry is None or now < expiry <= due
        assert expiry is not None or due == float("inf")


def test_who_is_restored_is_no_news_and_has_a_full_timeout() -> None:
    roster = Roster(TIMEOUT)

    roster.restore(("a", "b"), {"b": {"i": 3}, "c": {"i": 1}}, 100.0)

    assert roster.news(100.0) == ([], [])
    assert list(roster.present(Role.TRAINER, 104.9)) == ["a", "b"]
    assert roster.news(105.0)[0] == [("a", Role.TRAINER), ("b", Role.TRAINER)]
    assert roster.confirmed() == {"b": {"i": 3}, "c": {"i": 1}}
