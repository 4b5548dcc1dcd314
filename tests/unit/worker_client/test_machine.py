from __future__ import annotations

from typing import Any

import pytest

from broker.messages import Reason, Rounds, UpdateId
from tests.unit.worker_client.models import head_of
from worker_client.core import EvaluatorMachine, State, WorkerMachine
from worker_client.core import events as ev


def machine(*events: ev.Event, **options: Any) -> WorkerMachine:
    """A machine that has seen ``events``."""
    result = WorkerMachine("w0", "i0", **options)
    for event in events:
        result.handle(event)
    return result


def arrived(version: int = 0, **rest: Any) -> ev.ParametersArrived:
    return ev.ParametersArrived(head_of(version, **rest))


TRAINED_AND_PUBLISHED = (ev.TrainingDone(), ev.PublishConfirmed())
SYNCHRONOUS: dict[str, Any] = {"rounds": Rounds.SYNCHRONOUS}
NOTHING: list[ev.Effect] = []
GOODBYE = {reason: [ev.SayGoodbye(reason), ev.Exit(reason)] for reason in ("done", "stopped", "limit")}


# ------------------------------------------------------------------------------------------ the normal course


def test_it_says_hello_on_each_connection_with_the_newest_version() -> None:
    worker = machine()

    assert worker.handle(ev.Connected()) == [ev.SayHello(-1)]
    worker.handle(arrived(7))
    assert worker.handle(ev.Connected()) == [ev.SayHello(7)]


def test_it_trains_publishes_and_waits_for_the_next_version() -> None:
    worker = machine()

    assert worker.handle(arrived(0)) == [ev.Train(head_of(0), 0)]
    assert worker.handle(ev.TrainingDone()) == [ev.Publish()]
    assert worker.handle(ev.PublishConfirmed()) == NOTHING
    assert worker.state is State.WAITING
    assert worker.handle(arrived(1)) == [ev.Train(head_of(1), 0)]


def test_a_newer_version_does_not_stop_a_training_and_is_taken_after_it() -> None:
    worker = machine(arrived(0))

    assert worker.handle(arrived(1)) == NOTHING
    assert worker.handle(arrived(2)) == NOTHING
    assert worker.handle(ev.TrainingDone()) == [ev.Publish(), ev.Train(head_of(2), 0)]
    assert worker.handle(ev.PublishConfirmed()) == NOTHING


def test_it_leaves_after_as_many_updates_as_it_was_told() -> None:
    worker = machine(arrived(0), *TRAINED_AND_PUBLISHED, arrived(1), ev.TrainingDone(), max_updates=2)

    assert worker.handle(ev.PublishConfirmed()) == GOODBYE["limit"]
    assert worker.confirmed == 2


# ---------------------------------------------------------------------------------------------------- epochs


def test_what_a_replaced_aggregator_still_says_is_void() -> None:
    worker = machine(arrived(3, epoch=2), *TRAINED_AND_PUBLISHED)

    assert worker.handle(arrived(9, epoch=1)) == NOTHING
    assert worker.versions.newest == head_of(3, epoch=2)


def test_an_aggregator_that_went_back_is_followed() -> None:
    worker = machine(arrived(9, epoch=1), *TRAINED_AND_PUBLISHED)

    assert worker.handle(arrived(3, epoch=2)) == [ev.Train(head_of(3, epoch=2), 0)]


def test_a_version_that_comes_twice_counts_once() -> None:
    worker = machine(arrived(3), *TRAINED_AND_PUBLISHED)

    assert worker.handle(arrived(3)) == NOTHING
    assert worker.handle(arrived(2)) == NOTHING


def test_a_buffered_run_is_answered_anew_after_its_aggregator_restarted() -> None:
    # It may have come back from an older copy; without this, a run whose workers have all answered hangs.
    worker = machine(arrived(3), *TRAINED_AND_PUBLISHED)

    assert worker.handle(arrived(3, epoch=2)) == [ev.Train(head_of(3, epoch=2), 0)]


def test_a_synchronous_round_is_answered_again_after_a_restart_of_the_aggregator_unless_the_plan_has_it() -> None:
    """The new aggregator may not know that it rejected the answer, and then waits for one."""
    worker = machine(arrived(3, **SYNCHRONOUS), *TRAINED_AND_PUBLISHED)

    assert worker.handle(arrived(3, epoch=2, **SYNCHRONOUS, answered=("w0",))) == NOTHING
    assert isinstance(worker.handle(arrived(3, epoch=3, **SYNCHRONOUS))[0], ev.Train)


def test_a_buffered_run_may_ask_for_several_updates_of_one_version() -> None:
    worker = machine()
    plan = {"updates_per_version": 3}

    effects = [worker.handle(arrived(5, **plan))]
    for _ in range(3):
        effects.append(worker.handle(ev.TrainingDone()))
        worker.handle(ev.PublishConfirmed())

    head = head_of(5, **plan)
    assert effects == [
        [ev.Train(head, 0)],
        [ev.Publish(), ev.Train(head, 1)],
        [ev.Publish(), ev.Train(head, 2)],
        [ev.Publish()],
    ]
    assert worker.state is State.WAITING


def test_a_synchronous_round_is_answered_once_whatever_the_allowance() -> None:
    worker = machine(arrived(5, updates_per_version=3, **SYNCHRONOUS), ev.TrainingDone())

    assert worker.handle(ev.PublishConfirmed()) == NOTHING


def test_another_attempt_at_a_synchronous_round_is_answered_again() -> None:
    worker = machine(arrived(5, **SYNCHRONOUS), *TRAINED_AND_PUBLISHED)

    assert worker.handle(arrived(5, attempt=1, asked=1, **SYNCHRONOUS)) == [
        ev.Train(head_of(5, attempt=1, asked=1, **SYNCHRONOUS), 0)
    ]


@pytest.mark.parametrize("worker", [f"w{n}" for n in range(10)])
def test_only_sampled_workers_answer_a_synchronous_round(worker: str) -> None:
    for version in range(10):
        head = head_of(version, fraction=0.3, seed=7, **SYNCHRONOUS)
        effects = WorkerMachine(worker, "i").handle(ev.ParametersArrived(head))

        assert bool(effects) == head.plan.is_sampled(worker, version)


def test_buffered_runs_do_not_sample() -> None:
    assert machine().handle(arrived(0, fraction=0.0))


# ------------------------------------------------------------------------------------------------ publishing


def test_a_failed_publish_is_repeated_after_ever_longer_waits() -> None:
    worker = machine(arrived(0), ev.TrainingDone())
    waits = []
    for _ in range(12):
        [effect] = worker.handle(ev.PublishFailed())
        assert isinstance(effect, ev.BackOff)
        waits.append(effect.seconds)
        assert worker.state is State.BACKING_OFF
        assert worker.handle(ev.BackOffOver()) == [ev.PublishAgain()]

    assert 0.25 <= waits[0] <= 0.5
    assert 15 <= waits[-1] <= 30
    assert worker.handle(ev.PublishConfirmed()) == NOTHING
    assert worker.confirmed == 1


def test_workers_do_not_come_back_to_a_full_queue_at_once() -> None:
    waits: set[float] = set()
    for n in range(20):
        worker = WorkerMachine(f"w{n}", "i")
        for event in (arrived(0), ev.TrainingDone()):
            worker.handle(event)
        waits.update(effect.seconds for effect in worker.handle(ev.PublishFailed()) if isinstance(effect, ev.BackOff))

    assert len(waits) > 10


def test_a_new_connection_ends_the_wait_and_the_late_alarm_does_nothing() -> None:
    worker = machine(arrived(0), ev.TrainingDone(), ev.PublishFailed())

    assert worker.handle(ev.Connected()) == [ev.SayHello(0), ev.PublishAgain()]
    assert worker.handle(ev.BackOffOver()) == NOTHING
    assert worker.state is State.PUBLISHING


def test_the_waits_begin_anew_with_each_update() -> None:
    worker = machine(arrived(0), ev.TrainingDone())
    first = worker.handle(ev.PublishFailed())
    for event in (ev.BackOffOver(), ev.PublishConfirmed(), arrived(1), ev.TrainingDone()):
        worker.handle(event)

    assert worker.handle(ev.PublishFailed()) == first


# --------------------------------------------------------------------------------- publishing beside training


def test_one_update_is_published_and_one_waits_behind_it() -> None:
    worker = machine(arrived(0, updates_per_version=9), ev.TrainingDone())

    # Nothing more is trained while two are in hand
    assert worker.handle(ev.TrainingDone()) == NOTHING
    assert worker.state is State.PUBLISHING
    assert worker.handle(arrived(1, updates_per_version=9)) == NOTHING
    assert worker.handle(ev.PublishConfirmed()) == [ev.Publish(), ev.Train(head_of(1, updates_per_version=9), 0)]


def test_an_update_is_published_again_beside_a_training() -> None:
    worker = machine(arrived(0, updates_per_version=9), ev.TrainingDone())

    [back_off] = worker.handle(ev.PublishFailed())
    assert isinstance(back_off, ev.BackOff)
    assert worker.handle(ev.TrainingDone()) == NOTHING
    assert worker.state is State.BACKING_OFF
    assert worker.handle(ev.BackOffOver()) == [ev.PublishAgain()]
    assert worker.handle(ev.PublishConfirmed())[0] == ev.Publish()


def test_in_synchronous_rounds_an_update_is_published_before_the_next_training() -> None:
    worker = machine(arrived(0, **SYNCHRONOUS), ev.TrainingDone())

    assert worker.handle(arrived(1, **SYNCHRONOUS)) == NOTHING
    assert worker.handle(ev.PublishConfirmed()) == [ev.Train(head_of(1, **SYNCHRONOUS), 0)]


def test_no_more_is_trained_than_may_be_published() -> None:
    worker = machine(arrived(0, updates_per_version=9), max_updates=2)

    assert worker.handle(ev.TrainingDone())[1:] == [ev.Train(head_of(0, updates_per_version=9), 1)]
    assert worker.handle(ev.TrainingDone()) == NOTHING
    assert worker.handle(ev.PublishConfirmed()) == [ev.Publish()]
    assert worker.handle(ev.PublishConfirmed()) == GOODBYE["limit"]


def test_without_an_outbox_it_says_hello_again_once_for_each_failure() -> None:
    worker = machine(arrived(3), ev.TrainingDone())

    for _ in range(2):
        hello, back_off = worker.handle(ev.PublishFailed(lacks_outbox=True))
        assert hello == ev.SayHello(3)
        assert isinstance(back_off, ev.BackOff)
        assert worker.handle(ev.BackOffOver()) == [ev.PublishAgain()]


# --------------------------------------------------------------------------------------------------- leaving


def test_who_is_asked_to_stop_publishes_what_is_trained() -> None:
    worker = machine(arrived(0, updates_per_version=9), ev.TrainingDone(), ev.TrainingDone())

    assert worker.handle(ev.StopRequested()) == NOTHING
    assert worker.handle(ev.PublishConfirmed()) == [ev.Publish()]
    assert worker.handle(ev.PublishConfirmed()) == GOODBYE["stopped"]


def test_who_is_asked_to_stop_abandons_its_training_and_waits_for_the_update_on_its_way() -> None:
    for order in ((ev.Abandoned(), ev.PublishConfirmed()), (ev.PublishConfirmed(), ev.Abandoned())):
        worker = machine(arrived(0, updates_per_version=9), ev.TrainingDone())

        assert worker.handle(ev.StopRequested()) == [ev.Abandon()]
        assert worker.handle(order[0]) == NOTHING
        assert worker.handle(order[1]) == GOODBYE["stopped"]


def test_when_the_run_is_over_what_waits_is_dropped() -> None:
    waits = machine(arrived(0, updates_per_version=9), ev.TrainingDone(), ev.TrainingDone())
    backs_off = machine(arrived(0, updates_per_version=9), ev.TrainingDone(), ev.PublishFailed())

    assert waits.handle(arrived(9, done=True)) == NOTHING
    assert waits.handle(ev.PublishConfirmed()) == GOODBYE["done"]
    assert backs_off.handle(arrived(9, done=True)) == [ev.Abandon()]
    assert backs_off.handle(ev.TrainingDone()) == GOODBYE["done"]


def test_an_idle_worker_leaves_at_once() -> None:
    assert machine().handle(ev.StopRequested()) == GOODBYE["stopped"]


def test_a_training_is_abandoned_on_request() -> None:
    worker = machine(arrived(0))

    assert worker.handle(ev.StopRequested()) == [ev.Abandon()]
    assert worker.handle(ev.Abandoned()) == GOODBYE["stopped"]


def test_a_training_that_ended_before_the_request_reached_it_is_published() -> None:
    worker = machine(arrived(0), ev.StopRequested())

    assert worker.handle(ev.TrainingDone()) == [ev.Publish()]
    assert worker.handle(ev.PublishConfirmed()) == GOODBYE["stopped"]


@pytest.mark.parametrize("state", [(), (ev.PublishFailed(),)], ids=["publishing", "backing off"])
def test_an_update_on_its_way_is_awaited_for_a_bounded_time(state: tuple[ev.Event, ...]) -> None:
    worker = machine(arrived(0), ev.TrainingDone(), *state)

    assert worker.handle(ev.StopRequested()) == NOTHING
    assert worker.handle(ev.GraceOver()) == GOODBYE["stopped"]


def test_a_training_that_does_not_listen_cannot_keep_the_worker() -> None:
    worker = machine(arrived(0), ev.StopRequested())

    assert worker.handle(ev.GraceOver()) == GOODBYE["stopped"]


def test_grace_means_nothing_if_nobody_asked() -> None:
    assert machine(arrived(0)).handle(ev.GraceOver()) == NOTHING


@pytest.mark.parametrize("before", [(), (arrived(0), *TRAINED_AND_PUBLISHED)])
def test_the_runs_last_version_ends_an_idle_worker(before: tuple[ev.Event, ...]) -> None:
    assert machine(*before).handle(arrived(9, done=True)) == GOODBYE["done"]


def test_a_version_that_was_known_can_turn_out_to_be_the_last() -> None:
    assert machine(arrived(9), *TRAINED_AND_PUBLISHED).handle(arrived(9, done=True)) == GOODBYE["done"]


def test_the_runs_last_version_ends_a_training() -> None:
    worker = machine(arrived(0))

    assert worker.handle(arrived(9, done=True)) == [ev.Abandon()]
    assert worker.handle(ev.TrainingDone()) == GOODBYE["done"]


def test_the_runs_last_version_awaits_the_update_on_its_way_but_not_for_long() -> None:
    confirmed, refused = (machine(arrived(0), ev.TrainingDone()) for _ in range(2))
    assert confirmed.handle(arrived(9, done=True)) == NOTHING
    assert refused.handle(arrived(9, done=True)) == NOTHING

    assert confirmed.handle(ev.PublishConfirmed()) == GOODBYE["done"]
    assert refused.handle(ev.PublishFailed()) == GOODBYE["done"]


def test_a_failure_ends_it_in_any_state() -> None:
    for events in ((), (arrived(0),), (arrived(0), ev.TrainingDone())):
        assert machine(*events).handle(ev.Failed("disk full")) == [ev.SayGoodbye("disk full"), ev.Exit("failed")]


# --------------------------------------------------------------------------------------------------- notices


@pytest.mark.parametrize("reason", [Reason.TOO_STALE, Reason.ROUND_CLOSED, Reason.RUN_DONE])
def test_a_rejection_that_time_cures_changes_nothing(reason: Reason) -> None:
    worker = machine(arrived(0))

    assert worker.handle(ev.NoticeArrived(reason, UpdateId("w0", "i0", 0))) == NOTHING
    assert worker.state is State.TRAINING


def test_a_rejection_that_would_meet_every_update_ends_it() -> None:
    notice = ev.NoticeArrived(Reason.MODEL_MISMATCH, UpdateId("w0", "i0", 3))

    [goodbye, leave] = machine(arrived(0)).handle(notice)

    assert goodbye == ev.SayGoodbye("update w0/i0/3 rejected: model-mismatch")
    assert leave == ev.Exit("failed")


def test_a_rejection_of_a_predecessors_update_is_not_its_own() -> None:
    assert machine().handle(ev.NoticeArrived(Reason.MODEL_MISMATCH, UpdateId("w0", "before", 3))) == NOTHING


def rejected(seq: int, reason: Reason = Reason.NOT_FINITE) -> ev.NoticeArrived:
    return ev.NoticeArrived(reason, UpdateId("w0", "i0", seq))


def rest_of(effects: list[ev.Effect]) -> float:
    [effect] = effects
    assert isinstance(effect, ev.Rest)
    return effect.seconds


def test_after_a_rejection_the_next_training_waits_ever_longer() -> None:
    worker = machine()
    rests = []
    for seq in range(9):
        assert isinstance(worker.handle(arrived(seq))[0], ev.Train)
        for event in TRAINED_AND_PUBLISHED:
            worker.handle(event)
        rests.append(rest_of(worker.handle(rejected(seq))))
        assert worker.state is State.RESTING
        assert worker.handle(ev.RestOver()) == NOTHING

    assert 0.5 <= rests[0] <= 1
    assert 30 <= rests[-1] <= 60


def test_what_arrives_while_it_rests_is_trained_afterwards() -> None:
    worker = machine(arrived(0), *TRAINED_AND_PUBLISHED, rejected(0))

    assert worker.handle(arrived(0, attempt=1, asked=1)) == NOTHING
    assert worker.handle(ev.Connected()) == [ev.SayHello(0)]
    assert worker.handle(ev.RestOver()) == [ev.Train(head_of(0, attempt=1, asked=1), 0)]
    assert worker.handle(ev.RestOver()) == NOTHING


def test_a_training_in_progress_is_published_before_the_rest() -> None:
    worker = machine(arrived(0), *TRAINED_AND_PUBLISHED, arrived(1))

    assert worker.handle(rejected(0)) == NOTHING
    publish, *rest = worker.handle(ev.TrainingDone())
    assert publish == ev.Publish()
    assert rest_of(rest) <= 1
    assert worker.handle(ev.PublishConfirmed()) == NOTHING


@pytest.mark.parametrize("reason", [Reason.TOO_STALE, Reason.SECOND_IN_ROUND, Reason.WORKER_SHARE, Reason.ROLLED_BACK])
def test_a_rejection_for_its_time_asks_for_no_rest(reason: Reason) -> None:
    worker = machine(arrived(0), *TRAINED_AND_PUBLISHED)

    assert worker.handle(rejected(0, reason)) == NOTHING
    assert worker.state is State.WAITING


def test_a_worker_that_was_too_slow_trains_from_the_newest_version_next() -> None:
    """It was told of several versions while it trained; the one that it begins with next is the last of them."""
    worker = machine(arrived(0))
    for version in (1, 2, 30):
        worker.handle(arrived(version))

    effects = worker.handle(ev.TrainingDone())

    assert [effect.head.version for effect in effects if isinstance(effect, ev.Train)] == [30]
    worker.handle(ev.PublishConfirmed())
    assert worker.handle(rejected(0, Reason.TOO_STALE)) == NOTHING
    assert worker.state is State.TRAINING
    assert worker.handle(ev.TrainingDone())[0] == ev.Publish()


def test_a_resting_worker_can_be_asked_to_leave() -> None:
    for leave, reason in ((ev.StopRequested(), "stopped"), (arrived(9, done=True), "done")):
        assert machine(arrived(0), *TRAINED_AND_PUBLISHED, rejected(0)).handle(leave) == GOODBYE[reason]


def test_it_gives_up_after_ten_updates_in_a_row_that_are_not_finite() -> None:
    worker = machine(*map(rejected, range(9)))

    assert worker.handle(rejected(9)) == [ev.SayGoodbye("diverged"), ev.Exit("diverged")]


def test_an_update_that_was_taken_between_them_ends_the_row() -> None:
    worker = machine(arrived(0), *TRAINED_AND_PUBLISHED, *map(rejected, range(9)))

    # Nobody said anything against 9; and the former ones may be told again, or replayed from the dead letters.
    assert rest_of(worker.handle(rejected(10))) <= 1
    for seq in range(10):
        assert worker.handle(rejected(seq)) == NOTHING


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize("event", [ev.TrainingDone(), ev.Abandoned(), ev.PublishConfirmed(), ev.PublishFailed()])
def test_an_event_that_cannot_come_now_is_an_error(event: ev.Event) -> None:
    with pytest.raises(RuntimeError, match="in state waiting"):
        machine().handle(event)


# ------------------------------------------------------------------------------------------------- evaluator


def evaluator(*events: ev.Event) -> EvaluatorMachine:
    result = EvaluatorMachine()
    for event in events:
        result.handle(event)
    return result


def test_an_evaluator_takes_only_the_newest_of_what_came_meanwhile() -> None:
    machine = evaluator()

    assert machine.handle(arrived(0)) == [ev.Evaluate(head_of(0))]
    assert machine.handle(arrived(1)) == NOTHING
    assert machine.handle(arrived(2)) == NOTHING
    assert machine.handle(ev.EvaluationDone()) == [ev.Evaluate(head_of(2))]
    assert machine.handle(ev.EvaluationDone()) == NOTHING


def test_an_evaluator_evaluates_the_last_version_before_it_leaves() -> None:
    machine = evaluator(arrived(0), arrived(9, done=True))

    assert machine.handle(ev.EvaluationDone()) == [ev.Evaluate(head_of(9, done=True))]
    assert machine.handle(ev.EvaluationDone()) == GOODBYE["done"]


def test_an_evaluator_does_not_evaluate_the_same_parameters_twice() -> None:
    machine = evaluator(arrived(9), ev.EvaluationDone())

    assert machine.handle(arrived(9, epoch=2)) == NOTHING
    assert machine.handle(arrived(9, epoch=2, done=True)) == GOODBYE["done"]


def test_an_evaluator_stops_in_the_middle() -> None:
    machine = evaluator(ev.Connected(), arrived(0))

    assert machine.handle(ev.StopRequested()) == [ev.Abandon()]
    assert machine.handle(ev.Abandoned()) == GOODBYE["stopped"]


def test_an_evaluator_stops_at_once_when_idle_and_is_ended_by_a_failure() -> None:
    assert evaluator().handle(ev.StopRequested()) == GOODBYE["stopped"]
    assert evaluator(arrived(0)).handle(ev.Failed("x")) == [ev.SayGoodbye("x"), ev.Exit("failed")]
    assert evaluator(arrived(0), ev.StopRequested()).handle(ev.GraceOver()) == GOODBYE["stopped"]
    assert evaluator().handle(ev.Connected()) == [ev.SayHello(-1)]
