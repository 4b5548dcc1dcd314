"""When rounds close, what they refuse, who is waited for, when the run ends."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.machine import RoundMachine
from aggregator.core.rounds import Buffered, Synchronous
from aggregator.core.rules import CommitPolicy
from broker.errors import ConfigError
from broker.messages import Mode, Plan, Reason, Role
from broker.transport import Token
from tests.support.builders import rules_of, snapshot_of, update_of, vector
from tests.unit.aggregator.driver import Driver


def driver_of(**rules: Any) -> Driver:
    return Driver(rules_of(**rules), snapshot_of({"w": vector(0)}))


ONE = {"w": vector(1)}


def test_the_current_version_is_broadcast_as_soon_as_there_is_a_connection_and_again_after_each() -> None:
    driver = driver_of()
    driver.send(on.LinkUp(2))

    assert [(b.epoch, b.version) for b in driver.broadcasts] == [(1, 0), (1, 0)]


@pytest.mark.parametrize(
    ("update", "reason"),
    [
        (update_of(ONE, run="other"), Reason.WRONG_RUN),
        (update_of(ONE, mode=Mode.GRADIENT), Reason.WRONG_MODE),
        (update_of({"w": vector(1, 2)}), Reason.MODEL_MISMATCH),
        (update_of({"v": vector(1)}), Reason.MODEL_MISMATCH),
        (update_of({"w": vector(1, dtype=np.float16)}), Reason.MODEL_MISMATCH),
        (update_of(ONE, examples=0), Reason.NO_EXAMPLES),
        (update_of(ONE, base_version=1), Reason.FUTURE_VERSION),
        (update_of(ONE, base_epoch=2), Reason.FUTURE_VERSION),
        (update_of({"w": vector(np.nan)}), Reason.NOT_FINITE),
        (update_of({"w": vector(np.inf)}), Reason.NOT_FINITE),
        (update_of({"w": vector(-np.inf)}), Reason.NOT_FINITE),
    ],
    ids=lambda value: value.value if isinstance(value, Reason) else "",
)
def test_an_unusable_update_is_rejected_counted_and_its_worker_told(update: Any, reason: Reason) -> None:
    driver = driver_of()

    token = driver.update(update)

    assert driver.rejected == [(token, reason)]
    assert driver.acked == []
    assert driver.machine.rejected == {reason.value: 1}
    assert [(tell.worker, tell.reason, tell.update) for tell in driver.told] == [("w0", reason, update.id)]
    assert driver.machine.fill == 0


def test_values_so_large_that_sums_would_overflow_count_as_infinite() -> None:
    driver = driver_of(rounds=Buffered(size=2, max_staleness=0))

    driver.update(update_of({"w": vector(1e18)}, seq=0))
    driver.update(update_of({"w": vector(3e30)}, seq=1))

    assert driver.machine.fill == 1
    assert driver.reasons == [Reason.NOT_FINITE]


def test_buffered_takes_what_is_within_the_staleness_and_rejects_what_is_not() -> None:
    driver = driver_of(rounds=Buffered(size=1, max_staleness=1))
    for seq in range(2):
        driver.update(update_of(ONE, seq=seq, base_version=seq))

    driver.update(update_of(ONE, seq=2, base_version=1))
    driver.update(update_of(ONE, seq=3, base_version=1))

    assert driver.machine.version == 3
    assert driver.reasons == [Reason.TOO_STALE]


def test_a_deadline_closes_a_buffer_that_is_not_full_but_never_an_empty_one() -> None:
    driver = driver_of(rounds=Buffered(size=10, max_staleness=9, minimum=2, deadline=30))
    driver.tick(31)
    driver.update(update_of(ONE, seq=0))
    assert driver.machine.version == 0

    driver.update(update_of(ONE, seq=1))
    driver.tick(31)

    assert driver.machine.version == 1
    assert driver.parameters["w"][0] == 1.0


def test_a_synchronous_round_waits_for_everybody_who_is_here() -> None:
    driver = driver_of(rounds=Synchronous())
    driver.hello("a", "b", "c")

    driver.update(update_of(ONE, worker="a"))
    driver.update(update_of(ONE, worker="b"))
    assert driver.machine.version == 0
    driver.update(update_of(ONE, worker="c"))

    assert driver.machine.version == 1


def test_a_worker_that_leaves_or_falls_silent_is_not_waited_for() -> None:
    driver = driver_of(rounds=Synchronous(), worker_timeout=15)
    driver.hello("a", "b", "c")
    driver.update(update_of(ONE, worker="a"))

    driver.goodbye("b")
    assert driver.machine.version == 0
    driver.tick(10)
    driver.send(on.Seen("a", "i", Role.TRAINER, 1))
    driver.tick(6)

    assert driver.machine.version == 1


def test_an_evaluator_is_not_waited_for() -> None:
    driver = driver_of(rounds=Synchronous())
    driver.hello("a")
    driver.hello("e", role=Role.EVALUATOR)

    driver.update(update_of(ONE, worker="a"))

    assert driver.machine.version == 1


def test_synchronous_rounds_refuse_late_and_second_answers() -> None:
    driver = driver_of(rounds=Synchronous(minimum=2))
    driver.hello("a", "b")
    driver.update(update_of(ONE, worker="a", seq=0))
    driver.update(update_of(ONE, worker="a", seq=1))
    driver.update(update_of(ONE, worker="b", seq=0))
    driver.update(update_of(ONE, worker="b", seq=1))

    assert driver.machine.version == 1
    assert driver.reasons == [Reason.SECOND_IN_ROUND, Reason.ROUND_CLOSED]


def test_a_late_answer_does_not_count_as_one_to_the_round_that_is_open() -> None:
    driver = driver_of(rounds=Synchronous(), worker_timeout=1000)
    driver.hello("a", "b")
    driver.update(update_of(ONE, worker="a"))
    driver.goodbye("b")
    assert driver.machine.version == 1
    driver.hello("b")

    driver.update(update_of(ONE, worker="b"))
    driver.update(update_of(ONE, worker="a", seq=1, base_version=1))

    assert driver.reasons == [Reason.ROUND_CLOSED]
    assert driver.machine.version == 1


def test_a_round_whose_answers_were_rejected_is_asked_for_again() -> None:
    driver = driver_of(rounds=Synchronous(), retry_seconds=5)
    driver.hello("a")
    driver.update(update_of({"w": vector(np.nan)}, worker="a"))

    driver.tick(6)

    assert [b.plan.attempt for b in driver.broadcasts] == [0, 1]
    driver.update(update_of(ONE, worker="a", seq=1))
    assert driver.machine.version == 1


def test_who_has_answered_well_is_not_asked_again() -> None:
    driver = driver_of(rounds=Synchronous(minimum=2), retry_seconds=5)
    driver.hello("a", "b")
    driver.update(update_of(ONE, worker="a"))
    driver.update(update_of({"w": vector(np.nan)}, worker="b"))

    driver.tick(6)

    plan = driver.broadcasts[-1].plan
    assert (plan.attempt, plan.is_sampled("a", 0), plan.is_sampled("b", 0)) == (1, False, True)
    assert Driver(driver.machine.rules, driver.machine.snapshot(0.0)).broadcasts[-1].plan.answered == ("a",)


def test_a_draw_that_samples_nobody_is_repeated() -> None:
    driver = driver_of(rounds=Synchronous(fraction=0.01), retry_seconds=1, worker_timeout=1e9)
    driver.hello("a")

    for _ in range(1000):
        driver.tick(2)
        if driver.broadcasts[-1].plan.is_sampled("a", 0):
            break

    assert driver.broadcasts[-1].plan.is_sampled("a", 0)
    driver.update(update_of(ONE, worker="a"))
    assert driver.machine.version == 1


def test_sampling_is_the_same_on_both_sides_and_about_the_fraction() -> None:
    plan = Plan(fraction=0.3, seed=5)
    drawn = [plan.is_sampled(f"w{i}", 4) for i in range(10_000)]

    assert drawn == [Plan(fraction=0.3, seed=5).is_sampled(f"w{i}", 4) for i in range(10_000)]
    assert 0.28 < np.mean(drawn) < 0.32
    assert all(Plan(fraction=1.0).is_sampled(f"w{i}", 0) for i in range(100))


def test_long_rounds_commit_in_the_middle_by_count_bytes_and_age() -> None:
    for policy, updates, wait in [
        (CommitPolicy(count=3), 3, 0.0),
        (CommitPolicy(nbytes=250), 3, 0.0),
        (CommitPolicy(seconds=60), 1, 61.0),
    ]:
        driver = driver_of(rounds=Buffered(size=100, max_staleness=0), commit=policy)
        for seq in range(updates):
            assert driver.acked == []
            driver.update(update_of(ONE, seq=seq))
        driver.tick(wait)
        assert len(driver.acked) == updates
        assert len(driver.disk.entries) == updates
        assert driver.disk.version == 0


def test_the_machine_says_when_it_must_be_woken() -> None:
    driver = driver_of(rounds=Buffered(size=100, max_staleness=0), commit=CommitPolicy(seconds=60))
    driver.now = 5.0

    driver.update(update_of(ONE))

    assert driver.wake_at is not None
    assert driver.wake_at <= 65.0


def test_a_restart_in_mid_round_goes_on_with_the_partial_round() -> None:
    rules = rules_of(rounds=Buffered(size=3, max_staleness=0), commit=CommitPolicy(count=2))
    first = Driver(rules, snapshot_of({"w": vector(0)}))
    first.update(update_of({"w": vector(3)}, seq=0))
    first.update(update_of({"w": vector(6)}, seq=1))

    second = Driver(rules, first.disk)
    again = second.update(update_of({"w": vector(6)}, seq=1))
    second.update(update_of({"w": vector(9)}, seq=2))

    assert second.acked[0] == again
    assert second.parameters["w"][0] == 6.0
    assert [entry.id.seq for entry in second.records[0].updates] == [0, 1, 2]


def test_the_mode_of_a_run_cannot_change() -> None:
    driver = driver_of(rounds=Buffered(size=1, max_staleness=0))
    driver.update(update_of(ONE))

    with pytest.raises(ConfigError, match="mode"):
        Driver(rules_of(mode=Mode.GRADIENT), driver.disk)


def test_a_finished_run_says_so_rejects_what_comes_late_and_waits_for_goodbyes() -> None:
    driver = driver_of(rounds=Buffered(size=1, max_staleness=0), stop_after_rounds=1)
    driver.hello("w0")
    driver.hello("e", role=Role.EVALUATOR)
    driver.update(update_of(ONE))
    assert driver.broadcasts[-1].plan.done

    driver.update(update_of(ONE, seq=1))
    assert driver.reasons == [Reason.RUN_DONE]
    driver.goodbye("w0", confirmed=2)
    assert driver.endings == []
    driver.send(on.Evaluated("e", 1, {"loss": 0.5}))

    assert driver.endings == ["done"]
    assert driver.machine.roster.confirmed() == {"w0": {"i": 2}}


def test_a_finished_run_does_not_wait_for_ever() -> None:
    driver = driver_of(rounds=Buffered(size=1, max_staleness=0), stop_after_rounds=1, linger_seconds=30)
    driver.update(update_of(ONE))
    for _ in range(7):
        driver.tick(5)
        driver.send(on.Seen("w0", "i", Role.TRAINER, 1))

    assert driver.endings == ["done"]


def test_a_finished_run_that_is_started_again_first_sends_its_last_version_out() -> None:
    driver = driver_of(rounds=Buffered(size=1, max_staleness=0), stop_after_rounds=1)
    driver.update(update_of(ONE))
    again = RoundMachine(driver.machine.rules, replace(driver.disk, epoch=2, trainers=()), 100.0)

    assert not any(isinstance(effect, do.Finish) for effect in again.handle(on.Tick(), 200.0))
    effects = again.handle(on.LinkUp(1), 201.0)

    assert [type(effect) for effect in effects] == [do.Broadcast, do.Finish]


def test_more_rounds_after_the_last() -> None:
    driver = driver_of(rounds=Buffered(size=1, max_staleness=0), stop_after_rounds=1)
    driver.update(update_of(ONE))
    assert driver.disk.done

    more = Driver(rules_of(rounds=Buffered(size=1, max_staleness=0), stop_after_rounds=2), driver.disk)

    assert not more.machine.done
    assert not more.broadcasts[-1].plan.done
    more.update(update_of(ONE, seq=1, base_version=1))
    assert more.machine.version == 2


def test_stopping_commits_what_is_folded_and_leaves_the_rest_in_the_queue() -> None:
    driver = driver_of(rounds=Buffered(size=9, max_staleness=0))
    driver.update(update_of(ONE, seq=0))
    driver.send(on.StopRequested())
    assert driver.endings == ["stopped"]

    late = driver.update(update_of(ONE, seq=1))

    assert late not in driver.acked
    assert driver.rejected == []
    assert len(driver.disk.entries) == 1


def test_an_unreadable_message_is_rejected_with_its_reason() -> None:
    driver = driver_of()

    driver.send(on.Unreadable(Token(1, 9), Reason.MALFORMED, "nonsense", "w3"))

    assert driver.rejected == [(Token(1, 9), Reason.MALFORMED)]
    assert driver.told[0].worker == "w3"


def test_a_repeated_update_is_a_fact_but_no_rejection() -> None:
    driver = driver_of(rounds=Buffered(size=1, max_staleness=9))
    driver.update(update_of(ONE))

    again = driver.update(update_of(ONE))

    assert driver.acked[-1] == again
    assert driver.parameters["w"][0] == 1.0
    assert any(isinstance(fact, do.Repeated) for fact in driver.facts)


def test_who_comes_leaves_and_falls_silent_is_said_once() -> None:
    driver = driver_of(worker_timeout=15)
    driver.hello("a", "b")
    driver.goodbye("a")
    driver.tick(16)
    driver.tick(16)
    driver.hello("b")

    told = [fact for fact in driver.facts if isinstance(fact, do.Came | do.Went)]
    trainer = Role.TRAINER
    assert told == [
        do.Came("a", trainer),
        do.Came("b", trainer),
        do.Went("a", trainer, "left"),
        do.Went("b", trainer, ""),
        do.Came("b", trainer),
    ]


def test_two_workers_with_one_name_are_noticed_and_a_restarted_one_is_not() -> None:
    driver = driver_of()
    for incarnation in ("one", "one", "two", "two"):
        driver.send(on.Seen("a", incarnation, Role.TRAINER, 0))
    assert not any(isinstance(fact, do.Warn) for fact in driver.facts)

    for incarnation in ("one", "two", "one"):
        driver.send(on.Seen("a", incarnation, Role.TRAINER, 0))

    assert ["two workers called a" in fact.text for fact in driver.facts if isinstance(fact, do.Warn)] == [True]


def test_the_confirmed_updates_of_a_worker_that_was_restarted_a_thousand_times_are_all_counted() -> None:
    driver = driver_of()
    for life in range(1000):
        driver.send(on.Seen("w0", f"i{life}", Role.TRAINER, 2))

    confirmed = driver.machine.roster.confirmed()["w0"]

    assert sum(confirmed.values()) == 2000
    assert len(confirmed) <= 101
