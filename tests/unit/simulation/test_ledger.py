"""A ledger whose snapshots are made when they are looked at."""

from __future__ import annotations

import random

import pytest

from aggregator.core.ledger import Ledger
from broker.messages import UpdateId
from fedmq.simulation.ledger import JournaledLedger


@pytest.mark.parametrize("seed", range(10))
def test_a_late_look_at_a_snapshot_sees_what_was_there(seed: int) -> None:
    draw, journaled, plain = random.Random(seed), JournaledLedger(), Ledger()
    ids = [UpdateId(f"w{w}", "i", seq) for w in range(4) for seq in range(12)]
    draw.shuffle(ids)
    taken = []
    for number, update in enumerate(ids):
        journaled.add(update)
        plain.add(update)
        if number % 5 == 0:
            taken.append((journaled.to_plain(), plain.to_plain()))
        if number % 17 == 16:
            journaled.forget(taken[-1][0])
            taken = taken[-1:]

    assert len(journaled) == len(plain) == len(ids)
    for late, at_once in taken:
        assert dict(late) == at_once
        assert list(JournaledLedger(late)) == list(Ledger(at_once))


def test_what_was_forgotten_cannot_be_looked_at() -> None:
    ledger = JournaledLedger()
    early = ledger.to_plain()
    ledger.add(UpdateId("w", "i", 0))
    ledger.forget(ledger.to_plain())

    with pytest.raises(ValueError, match="forgotten"):
        len(early)


def test_what_is_discarded_is_not_there_and_can_come_again() -> None:
    ledger = Ledger()
    for seq in range(5):
        ledger.add(UpdateId("w", "i", seq))
    for seq in (2, 0, 4, 7):
        ledger.discard(UpdateId("w", "i", seq))

    assert [one.seq for one in ledger] == [1, 3]
    assert len(ledger) == 2
    ledger.add(UpdateId("w", "i", 2))
    assert ledger.to_plain() == {"w": {"i": [[1, 3]]}}
