"""What operators change while a run goes on: when it is in force, when it is acknowledged, what a restart keeps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from aggregator.config import AggregatorConfig
from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.controls import Order
from aggregator.core.machine import RoundMachine
from aggregator.core.rounds import Buffered
from aggregator.core.snapshot import Snapshot, rolled_back
from aggregator.optimizers import Adam, OptimizerState, Sgd
from aggregator.strategies import Accumulator
from broker.errors import ConfigError, StrategyError
from broker.messages import Action, Reason
from broker.transport import Token
from tests.support.builders import rules_of, snapshot_of, update_of, vector
from tests.unit.aggregator.driver import Driver

ONE = {"w": vector(1)}
SMALL = rules_of(rounds=Buffered(size=2, max_staleness=100))
LARGE = rules_of(rounds=Buffered(size=3, max_staleness=100))


def driver_of(**rules: Any) -> Driver:
    return Driver(rules_of(**rules), snapshot_of({"w": vector(0)}))


def order(driver: Driver, action: Action, made: Order | None = None, command: str = "c1", tag: int = 1000) -> Token:
    token = Token(1, tag)
    driver.send(on.Ordered(token, command, action, made))
    return token


def snapshot_now(driver: Driver) -> Snapshot:
    """What is durable now; a function, lest mypy take it for what it was."""
    return driver.disk


def executed(driver: Driver) -> list[do.Executed]:
    return [fact for fact in driver.facts if isinstance(fact, do.Executed)]


def test_a_change_waits_for_the_rounds_boundary_and_is_durable_before_it_is_acknowledged() -> None:
    driver = driver_of()
    driver.update(update_of(ONE, seq=0))

    token = order(driver, Action.SET, Order({"buffer_size": 3}, LARGE))

    assert driver.acked == [Token(1, 1), token]  # the update with it: one commit for both
    assert driver.disk.pending == {"buffer_size": 3}
    assert driver.disk.changes == {}
    assert executed(driver) == [do.Executed("c1", 0, is_pending=True)]

    driver.update(update_of(ONE, seq=1))
    assert driver.machine.version == 1
    assert snapshot_now(driver).pending is None
    assert snapshot_now(driver).changes == {"buffer_size": 3}

    for seq in (2, 3):
        driver.update(update_of(ONE, seq=seq, base_version=1))
    assert driver.machine.version == 1
    driver.update(update_of(ONE, seq=4, base_version=1))
    assert driver.machine.version == 2


def test_between_two_rounds_it_is_in_force_at_once_and_workers_hear_of_it() -> None:
    driver = driver_of()

    order(driver, Action.SET, Order({"buffer_size": 3}, LARGE))

    assert driver.broadcasts[-1].plan.updates_per_version == 3
    assert driver.broadcasts[-1].plan.attempt > driver.broadcasts[0].plan.attempt
    assert executed(driver) == [do.Executed("c1", 0, is_pending=False)]


def test_a_command_that_comes_again_is_executed_once() -> None:
    driver = driver_of()
    order(driver, Action.SET, Order({"buffer_size": 3}, LARGE))
    order(driver, Action.SET, Order({}, SMALL), command="c2", tag=1001)

    again = order(driver, Action.SET, Order({"buffer_size": 3}, LARGE), tag=1002)

    assert driver.acked[-1] == again
    assert driver.machine.controls.changes == {}
    assert [done.command for done in executed(driver)] == ["c1", "c2", "c1"], "its answer comes again as well"


def test_a_restart_keeps_what_is_in_force_what_is_pending_and_the_pause() -> None:
    driver = driver_of()
    driver.update(update_of(ONE, seq=0))
    order(driver, Action.SET, Order({"buffer_size": 3}, LARGE))
    order(driver, Action.PAUSE, command="c2", tag=1001)

    again = Driver.__new__(Driver)
    Driver.__init__(again, SMALL, driver.disk)
    again.machine = RoundMachine(SMALL, driver.disk, 0.0, pending=LARGE)
    again.send(on.LinkUp(1))

    assert again.broadcasts[-1].plan.paused
    again.update(update_of(ONE, seq=1))
    assert again.machine.version == 0, "paused"
    order(again, Action.RESUME, command="c3")
    assert again.machine.version == 1
    assert again.machine.rules is LARGE
    assert again.disk.commands == ("c1", "c2", "c3")


def test_while_paused_updates_are_taken_in_and_no_round_closes() -> None:
    driver = driver_of()
    order(driver, Action.PAUSE)

    for seq in range(3):
        driver.update(update_of(ONE, seq=seq))

    assert (driver.machine.version, driver.machine.fill) == (0, 3)
    assert [b.plan.paused for b in driver.broadcasts] == [False, True]
    order(driver, Action.RESUME, command="c2", tag=1001)
    assert driver.records[-1].version == 1
    assert [b.plan.paused for b in driver.broadcasts][-1:] == [False]
    assert [entry.id.seq for entry in driver.records[0].updates] == [0, 1, 2]


def test_stop_makes_a_last_version_of_what_is_in_the_buffer() -> None:
    driver = driver_of()
    driver.hello("w0")
    driver.update(update_of(ONE, seq=0))

    order(driver, Action.STOP)

    assert driver.machine.done
    assert driver.machine.version == 1
    assert driver.broadcasts[-1].plan.done
    assert driver.disk.changes == {"stop_after_rounds": 1}
    driver.update(update_of(ONE, seq=1, base_version=1))
    assert driver.reasons == [Reason.RUN_DONE]
    driver.goodbye("w0")
    assert driver.endings == ["done"]


def test_a_finished_run_goes_on_when_its_limit_is_raised() -> None:
    driver = driver_of(stop_after_rounds=1)
    driver.hello("w0")
    for seq in range(2):
        driver.update(update_of(ONE, seq=seq))

    order(driver, Action.SET, Order({"stop_after_rounds": 5}, rules_of(stop_after_rounds=5)))

    assert [b.plan.done for b in driver.broadcasts] == [False, True, False]


def test_another_optimiser_starts_without_memory() -> None:
    driver = driver_of(optimizer=Sgd(1.0, momentum=0.9))
    for seq in range(2):
        driver.update(update_of(ONE, seq=seq))
    assert driver.disk.optimizer.slots["momentum"]

    order(driver, Action.SET, Order({"optimizer": "adam"}, rules_of(optimizer=Adam(0.1))))
    for seq in range(2, 4):
        driver.update(update_of(ONE, seq=seq, base_version=1))

    assert driver.disk.optimizer.slots.keys() == {"first", "second"}
    assert driver.disk.optimizer.step == 1


def test_commands_of_a_lost_connection_are_not_acknowledged_on_the_next() -> None:
    class Slow(Driver):
        """Its checkpoints take their time."""

        def send(self, event: on.Happening) -> None:
            for effect in self.machine.handle(event, self.now):
                if isinstance(effect, do.WriteCheckpoint):
                    self.commit = effect
                elif isinstance(effect, do.Ack):
                    self.acked.append(effect.token)

    driver = Slow(rules_of(), snapshot_of({"w": vector(0)}))
    order(driver, Action.PAUSE)
    driver.send(on.LinkLost(1))
    again = Token(2, 1)
    driver.send(on.Ordered(again, "c1", Action.PAUSE))
    driver.send(on.CheckpointWritten(driver.commit.commit))

    assert driver.acked == [again]


def test_who_is_asked_to_leave_while_the_disk_takes_nothing_leaves_and_acknowledges_nothing() -> None:
    machine = RoundMachine(SMALL, snapshot_of({"w": vector(0)}), 0.0)
    machine.handle(on.LinkUp(1), 0.0)
    machine.handle(on.Arrived(Token(1, 1), update_of(ONE), 8), 0.0)
    (write,) = [e for e in machine.handle(on.StopRequested(), 0.0) if isinstance(e, do.WriteCheckpoint)]

    effects = machine.handle(on.CheckpointFailed(write.commit, "disk full"), 1.0)

    assert do.Finish("stopped") in effects
    assert not any(isinstance(effect, do.Ack) for effect in effects)


# --------------------------------------------------------------------------------------------- taking a run back


def back(snapshot: Snapshot, **others: Any) -> Snapshot:
    values: dict[str, Any] = {"to": 1, "head": 3, "parameters": {"w": vector(5)}, "optimizer": OptimizerState({})}
    return rolled_back(snapshot, **(values | others), now=7.0)


def test_a_run_that_was_taken_back_goes_on_under_a_new_number_and_refuses_what_started_in_between() -> None:
    driver = driver_of()
    driver.update(update_of(ONE, seq=0))
    before = replace(driver.machine.snapshot(0.0), version=3)

    taken = back(before)
    driver = Driver(SMALL, taken)

    assert (taken.version, taken.void, taken.entries, taken.accumulator.count) == (4, ((2, 3),), (), 0)
    record = taken.records[-1]
    assert (record.version, record.source, [e.id.seq for e in record.dropped]) == (4, 1, [0])
    np.testing.assert_array_equal(driver.broadcasts[0].parameters["w"], [5])
    driver.update(update_of(ONE, seq=0))
    assert driver.machine.fill == 0, "what was dropped counts as known"
    for seq, base in enumerate((0, 1, 2, 3, 4), start=1):
        driver.update(update_of(ONE, seq=seq, base_version=base))
    assert driver.reasons == [Reason.ROLLED_BACK, Reason.ROLLED_BACK]
    assert driver.machine.version == 5


def test_what_is_in_the_buffer_stays_if_it_comes_from_before() -> None:
    accumulator = Accumulator({"w": vector(2)}, share=1.0, weight=1.0, count=1)

    taken = back(replace(snapshot_of({"w": vector(0)}), accumulator=accumulator), drop=False)

    assert taken.accumulator is accumulator
    assert taken.records[-1].dropped == ()


# ------------------------------------------------------------------------------------------- a round that is spoiled

HALF = {"w": vector(40000, dtype=np.float16)}


def test_a_step_that_is_not_finite_leaves_its_round_out_and_the_run_goes_on() -> None:
    driver = Driver(rules_of(), snapshot_of({"w": vector(60000, dtype=np.float16)}))
    for seq in range(2):
        driver.update(update_of(HALF, seq=seq))

    assert driver.machine.version == 1
    record = driver.records[-1]
    assert (record.updates, record.source, record.before) == ((), 0, record.after)
    assert [entry.id.seq for entry in record.dropped] == [0, 1]
    assert any(isinstance(fact, do.Warn) and "not finite" in fact.text for fact in driver.facts)
    np.testing.assert_array_equal(driver.disk.parameters["w"], [60000])
    assert len(driver.acked) == 2

    small = {"w": vector(-1000, dtype=np.float16)}
    for seq in range(2, 4):
        driver.update(update_of(small, seq=seq, base_version=1))
    np.testing.assert_array_equal(driver.disk.parameters["w"], vector(59000, dtype=np.float16))


def test_a_run_in_which_no_step_is_finite_stops_with_the_reason() -> None:
    driver = Driver(
        rules_of(rounds=Buffered(size=1, max_staleness=0)), snapshot_of({"w": vector(6e4, dtype=np.float16)})
    )

    for seq in range(4):
        driver.update(update_of(HALF, seq=seq, base_version=seq))
    with pytest.raises(StrategyError, match="learning_rate"):
        driver.update(update_of(HALF, seq=4, base_version=4))

    assert driver.disk.version == 4


# -------------------------------------------------------------------------------------------------- the settings


def test_changes_are_checked_like_the_settings_file() -> None:
    config = AggregatorConfig(buffer_size=8)

    assert config.changed({"buffer_size": "16", "deadline": 2}).buffer_size == 16
    assert config.normal({"buffer_size": "16", "deadline": "2"}) == {"buffer_size": 16, "deadline": 2.0}
    assert config.normal({"buffer_size": None}) == {}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"buffer_size": "many"}, "aggregator.buffer_size"),
        ({"buffer_size": 0}, "aggregator.buffer_size"),
        ({"mode": "gradient"}, "cannot be changed while the run goes on"),
        ({"bufer_size": 4}, "is no setting; did you mean buffer_size"),
        ({"minimum_updates": 9}, "larger than buffer_size"),
        ({"commit_count": 5}, "cannot be changed"),
        ({"buffer_size": 10**20}, "aggregator.buffer_size"),
        ({"updates_per_version": 2**53}, "aggregator.updates_per_version"),
        ({"learning_rate": "inf"}, "aggregator.learning_rate"),
        ({"linger": float("inf")}, "aggregator.linger"),
        ({"worker_timeout": "nan"}, "aggregator.worker_timeout"),
    ],
)
def test_a_change_that_makes_no_sense_says_what_is_wrong(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        AggregatorConfig(buffer_size=8).normal(changes)
