"""Hellos and events take so much memory of the aggregator and no more, and no account takes another's room."""

from __future__ import annotations

import queue

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.gate import Gate, GateLimits
from aggregator.intake import LARGEST_ASIDE, MOST_ASIDE, MOST_ASIDE_BYTES, MOST_NAMED, Intake
from broker.transport import Delivery, Source, Token


def event(user: str, nbytes: int = 1) -> Delivery:
    return Delivery(source=Source.EVENT, body=bytes(nbytes), user=user)


@pytest.fixture
def intake() -> Intake[object]:
    return Intake(lambda who: who == "aggregator")


def drained(intake: Intake[object]) -> list[object]:
    found = []
    while not intake.empty():
        found.append(intake.get(timeout=0))
    return found


def test_a_flood_that_nobody_reads_waits_up_to_a_bound_and_others_have_their_own(intake: Intake[object]) -> None:
    for _ in range(MOST_ASIDE + 50):
        intake.put(event("mallory"))
    good = event("w1")
    intake.put(good)
    found = drained(intake)
    assert len(found) == MOST_ASIDE + 1
    assert found[-1] is good
    assert intake.left_out() == {"mallory": 50}
    assert intake.left_out() == {}
    intake.put(event("mallory"))
    assert len(drained(intake)) == 1


def test_large_ones_are_bounded_in_bytes(intake: Intake[object]) -> None:
    size = MOST_ASIDE_BYTES // 20
    for _ in range(30):
        intake.put(event("mallory", size))
    assert len(drained(intake)) == 20
    assert intake.left_out() == {"mallory": 10}


@pytest.mark.parametrize("user", ["mallory", "aggregator"])
def test_what_is_larger_than_any_hello_never_comes_in(intake: Intake[object], user: str) -> None:
    intake.put(event(user, LARGEST_ASIDE + 1))
    assert intake.empty()
    assert intake.left_out() == {user: 1}


def test_updates_commands_and_whoever_stands_for_many_are_not_counted(intake: Intake[object]) -> None:
    update = Delivery(source=Source.UPDATE, body=bytes(LARGEST_ASIDE + 1), user="w1", token=Token(1, 1))
    command = Delivery(source=Source.CONTROL, body=b"", user="w1", token=Token(1, 1))
    for _ in range(MOST_ASIDE + 1):
        for item in (update, command, event("aggregator")):
            intake.put(item)
    assert len(drained(intake)) == 3 * (MOST_ASIDE + 1)
    assert intake.left_out() == {}


def test_accounts_without_number_are_counted_as_one(intake: Intake[object]) -> None:
    for number in range(MOST_NAMED + 100):
        intake.put(event(f"w{number}", LARGEST_ASIDE + 1))
    left_out = intake.left_out()
    assert len(left_out) == MOST_NAMED + 1
    assert left_out[""] == 100


@given(st.lists(st.tuples(st.booleans(), st.sampled_from("abc"), st.integers(0, 2**20)), max_size=100))
def test_once_all_is_read_nothing_is_remembered(steps: list[tuple[bool, str, int]]) -> None:
    intake: Intake[object] = Intake(lambda _who: False)
    for is_put, user, size in steps:
        if is_put:
            intake.put(event(user, size))
        elif not intake.empty():
            intake.get(timeout=0)
    drained(intake)
    assert not intake._waiting
    assert not intake._bytes
    with pytest.raises(queue.Empty):
        intake.get(timeout=0)


def test_what_was_left_out_is_told_by_the_gate(intake: Intake[object]) -> None:
    gate = Gate(GateLimits(), lambda: 1000.0, intake.left_out)
    for _ in range(3):
        intake.put(event("mallory", LARGEST_ASIDE + 1))
    (shut,) = gate.due()
    assert (shut.worker, shut.count) == ("mallory", 3)
