"""Whoever sends too much is refused unread; nobody else is, and nobody for another."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.allowance import BAD, MOST, STALLED, Allowances, Limit
from aggregator.gate import ASIDE, MOST_TOLD, Gate, GateLimits, too_large
from aggregator.senders import Senders
from broker.messages import Reason, UpdateId
from broker.transport import Delivery, Source, Token, largest_update

SENDERS = Senders("aggregator", frozenset({"olga"}))


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def update_from(user: str, nbytes: int = 10, **more: object) -> Delivery:
    return Delivery(source=Source.UPDATE, body=bytes(nbytes), user=user, token=Token(1, 1), **more)  # type: ignore[arg-type]


def rejected(worker: str, reason: Reason = Reason.MALFORMED) -> do.Rejected:
    return do.Rejected(worker, reason, "")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def gate(clock: Clock) -> Gate:
    return Gate(GateLimits(), clock)


# ------------------------------------------------------------------------------------------------- allowances


@given(
    steps=st.lists(st.tuples(st.floats(0, 10), st.floats(0.1, 5)), max_size=60),
    burst=st.floats(1, 50),
    rate=st.floats(0.1, 20),
)
def test_nobody_gets_more_than_the_burst_and_the_rate_allow(
    steps: list[tuple[float, float]], burst: float, rate: float
) -> None:
    allowances, now, spent = Allowances(Limit(burst, rate)), 0.0, 0.0
    for pause, cost in steps:
        now += pause
        if allowances.has_any("w", now):
            allowances.spend("w", cost, now)
            spent += cost
    assert spent <= burst + rate * now + 5 + 1e-6


def test_what_time_gives_back_is_no_more_than_the_burst() -> None:
    allowances = Allowances(Limit(2, 1))
    for _ in range(2):
        allowances.spend("w", 1, 0.0)
    assert not allowances.has_any("w", 0.5)
    assert allowances.has_any("w", 1.0)
    allowances.spend("w", 2, 1e6)
    assert not allowances.has_any("w", 1e6)


def test_a_clock_that_is_set_back_gives_and_takes_nothing() -> None:
    allowances = Allowances(Limit(1, 1))
    allowances.spend("w", 1, 100.0)
    assert not allowances.has_any("w", 50.0)


def test_made_up_names_take_no_memory_without_end() -> None:
    allowances = Allowances(BAD)
    for number in range(MOST + 500):
        allowances.spend(f"w{number}", 1, 0.0)
    assert len(allowances._buckets) == MOST


# ------------------------------------------------------------------------------------------------------ updates


def test_a_hundred_bad_messages_and_no_more_is_read_but_one_a_second(gate: Gate, clock: Clock) -> None:
    for _ in range(int(BAD.burst)):
        assert not gate.is_shut(update_from("w1"), SENDERS)
        gate.note(rejected("w1"), 0)
    assert gate.is_shut(update_from("w1"), SENDERS)
    assert not gate.is_shut(update_from("w2"), SENDERS)
    clock.now += 1.0
    assert not gate.is_shut(update_from("w1"), SENDERS)
    gate.note(rejected("w1"), 0)
    assert gate.is_shut(update_from("w1"), SENDERS)


@pytest.mark.parametrize("reason", [Reason.TOO_STALE, Reason.ROUND_CLOSED, Reason.SECOND_IN_ROUND, Reason.WORKER_SHARE])
def test_what_comes_too_late_counts_little(gate: Gate, clock: Clock, reason: Reason) -> None:
    for _ in range(4000):
        gate.note(rejected("w1", reason), 0)
    assert not gate.is_shut(update_from("w1"), SENDERS)
    for _ in range(3000):  # forty a second may go on for ever
        clock.now += 0.025
        gate.note(rejected("w1", reason), 0)
    assert not gate.is_shut(update_from("w1"), SENDERS)
    for _ in range(5000):
        gate.note(rejected("w1", reason), 0)
    assert gate.is_shut(update_from("w1"), SENDERS)


def test_the_end_of_a_run_counts_against_nobody(gate: Gate) -> None:
    for _ in range(10_000):
        gate.note(rejected("w1", Reason.RUN_DONE), 0)
    assert not gate.is_shut(update_from("w1"), SENDERS)


def test_the_same_update_for_ever_is_no_longer_read_after_a_thousand(gate: Gate) -> None:
    count = 0
    while not gate.is_shut(update_from("w1"), SENDERS):
        gate.note(do.Repeated(UpdateId("w1", "i", 1)), 0)
        count += 1
    assert 900 < count < 1100


def test_what_nobody_vouches_for_is_judged_together(gate: Gate) -> None:
    for _ in range(int(BAD.burst)):
        gate.note(rejected("", Reason.NO_USER), 0)
    assert gate.is_shut(update_from(""), SENDERS)


@pytest.mark.parametrize("user", ["aggregator", "olga"])
def test_accounts_that_stand_for_many_are_never_shut(gate: Gate, user: str) -> None:
    for _ in range(1000):
        gate.note(rejected(user), 0)
    assert not gate.is_shut(update_from(user), SENDERS)


def test_what_was_let_in_is_let_in_with_its_chunks(gate: Gate) -> None:
    for _ in range(1000):
        gate.note(rejected("w1"), 0)
    assert not gate.is_shut(update_from("w1", chunks=(b"",)), SENDERS)
    assert not gate.is_shut(update_from("w1", lost="gone"), SENDERS)


def test_limits_of_updates_and_of_bytes_are_kept(clock: Clock) -> None:
    gate = Gate(GateLimits(updates_per_second=2.0, bytes_per_second=1000.0), clock)
    taken = sum(not gate.is_shut(update_from("w1", 1), SENDERS) for _ in range(100))
    assert taken == 20
    taken = sum(not gate.is_shut(update_from("w2", 3000), SENDERS) for _ in range(100))
    assert taken == 4
    clock.now += 5.0
    assert sum(not gate.is_shut(update_from("w1", 1), SENDERS) for _ in range(100)) == 10


def test_chunks_count_by_what_their_manifest_says(clock: Clock) -> None:
    gate = Gate(GateLimits(bytes_per_second=1000.0), clock)
    assert not gate.is_shut(update_from("w1", headers={"bytes": 20_000}), SENDERS)
    assert gate.is_shut(update_from("w1"), SENDERS)


# ------------------------------------------------------------------------------------------ the rest, and reports


def test_hellos_and_events_have_an_allowance_and_commands_have_none(gate: Gate) -> None:
    event = Delivery(source=Source.EVENT, body=b"", user="w1")
    taken = sum(not gate.is_shut_aside(event, SENDERS) for _ in range(5000))
    assert taken == ASIDE.burst
    assert not gate.is_shut_aside(Delivery(source=Source.CONTROL, body=b"", user="w1", token=Token(1, 1)), SENDERS)


def test_what_was_refused_is_told_once_a_second_in_sums(gate: Gate, clock: Clock) -> None:
    for _ in range(int(BAD.burst)):
        gate.note(rejected("w1"), 0)
    for _ in range(7):
        gate.is_shut(update_from("w1"), SENDERS)
    (shut,) = gate.due()
    assert (shut.worker, shut.reason, shut.count) == ("w1", Reason.TOO_MANY, 7)
    gate.is_shut(update_from("w1"), SENDERS)
    assert list(gate.due()) == []
    clock.now += 0.999
    assert list(gate.due()) == []
    clock.now += 0.001
    gate.note(rejected("w1"), 0)
    assert [s.count for s in gate.due()] == [1]


def test_a_report_does_not_count_as_a_bad_message_again(gate: Gate, clock: Clock) -> None:
    for _ in range(int(BAD.burst)):
        gate.note(rejected("w1"), 0)
    gate.note(do.Rejected("w1", Reason.TOO_MANY, "", None, 1), 0)
    clock.now += 1.0
    assert not gate.is_shut(update_from("w1"), SENDERS)


def test_a_thousand_accounts_that_flood_are_a_hundred_lines(gate: Gate) -> None:
    event = Delivery(source=Source.EVENT, body=b"")
    for number in range(1000):
        for _ in range(int(ASIDE.burst) + 1):
            gate.is_shut_aside(Delivery(source=Source.EVENT, body=event.body, user=f"w{number}"), SENDERS)
    shut = list(gate.due())
    assert len(shut) <= MOST_TOLD + 1
    assert sum(one.count for one in shut) == 1000


def test_what_is_larger_than_any_update_is_refused_before_it_is_read() -> None:
    largest = largest_update(1000)
    assert too_large(Token(1, 1), update_from("w1", largest), largest) is None
    refused = too_large(Token(1, 1), update_from("w1", largest + 1), largest)
    assert isinstance(refused, on.Unreadable)
    assert (refused.reason, refused.worker) == (Reason.TOO_LARGE, "w1")


def test_of_what_was_too_large_to_be_handed_over_the_size_is_known() -> None:
    delivery = Delivery(source=Source.UPDATE, body=b"", user="w1", token=Token(1, 1), left_out=10**9)
    refused = too_large(Token(1, 1), delivery, largest_update(1000))
    assert isinstance(refused, on.Unreadable)
    assert refused.detail.startswith("1000000000 bytes")


def test_whose_uploads_stall_again_and_again_is_not_waited_for(gate: Gate, clock: Clock) -> None:
    looked_for = 0
    while not gate.not_looked_for(update_from("w1"), SENDERS):
        gate.note(rejected("w1", Reason.INCOMPLETE), 0)
        looked_for += 1
    assert looked_for == BAD.burst / STALLED
    assert gate.is_shut(update_from("w1"), SENDERS)
    assert not gate.not_looked_for(update_from("w2"), SENDERS)
    assert not gate.not_looked_for(update_from("aggregator"), SENDERS)
    clock.now += 1.0
    assert not gate.not_looked_for(update_from("w1"), SENDERS)
    gate.note(rejected("w1", Reason.INCOMPLETE), 0)
    clock.now += STALLED - 2.0
    assert gate.not_looked_for(update_from("w1"), SENDERS)
