"""Versions in chunks: what is downloaded, when, and what is trained from it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from broker.messages import ParametersHead, Reason, Rounds, UpdateId
from tests.unit.worker_client.models import head_of
from worker_client.core import EvaluatorMachine, State, WorkerMachine
from worker_client.core import events as ev
from worker_client.core.versions import LONGEST_PAUSE

NOTHING: list[ev.Effect] = []
SYNCHRONOUS: dict[str, Any] = {"rounds": Rounds.SYNCHRONOUS}
GOODBYE = {reason: [ev.SayGoodbye(reason), ev.Exit(reason)] for reason in ("done", "stopped")}
PUBLISHED = (ev.TrainingDone(), ev.PublishConfirmed())


def offered(version: int = 0, **rest: Any) -> ev.Offered:
    return ev.Offered(head_of(version, **rest))


def arrived(version: int = 0, **rest: Any) -> ev.ParametersArrived:
    return ev.ParametersArrived(head_of(version, **rest))


def machine(*events: ev.Event, **options: Any) -> WorkerMachine:
    result = WorkerMachine("w0", "i0", **options)
    for event in events:
        result.handle(event)
    return result


# --------------------------------------------------------------------------------------------- what is downloaded


def test_an_offer_is_downloaded_and_trained_from() -> None:
    worker = machine()

    assert worker.handle(offered(3)) == [ev.Download(head_of(3))]
    assert worker.state is State.DOWNLOADING
    assert worker.handle(ev.Connected()) == [ev.SayHello(-1)], "it does not have it yet"
    assert worker.handle(arrived(3)) == [ev.Train(head_of(3), 0)]
    assert worker.handle(ev.Connected()) == [ev.SayHello(3)]


def test_one_download_is_finished_before_the_next_and_what_arrives_is_trained_from_though_overtaken() -> None:
    worker = machine(offered(1))

    assert worker.handle(offered(2)) == NOTHING
    assert worker.handle(offered(3)) == NOTHING
    # The next is downloaded beside the training.
    assert worker.handle(arrived(1)) == [ev.Train(head_of(1), 0)]
    assert worker.handle(offered(4)) == [ev.Download(head_of(4))]


def test_what_has_the_digest_of_the_tensors_in_hand_is_not_downloaded() -> None:
    worker = machine(offered(1), arrived(1), *PUBLISHED)

    again = head_of(1, epoch=2)
    assert worker.handle(ev.Offered(again)) == [ev.Train(again, 0)]
    spoiled = replace(head_of(2, epoch=2), digest=again.digest)
    assert worker.handle(ev.TrainingDone()) == [ev.Publish()]
    assert worker.handle(ev.Offered(spoiled)) == [ev.Train(spoiled, 0)]


def test_a_plan_that_is_told_anew_on_the_way_is_in_force_on_arrival() -> None:
    worker = machine(offered(1, paused=True))

    assert worker.handle(offered(1, attempt=1)) == [ev.Download(head_of(1, attempt=1))]
    assert worker.handle(offered(1, attempt=2, updates_per_version=2)) == NOTHING
    assert worker.handle(arrived(1, attempt=1)) == [ev.Train(head_of(1, attempt=2, updates_per_version=2), 0)]


def test_what_is_not_trained_from_is_not_downloaded() -> None:
    assert machine().handle(offered(1, paused=True)) == NOTHING
    assert machine().handle(offered(1, fraction=0.0, **SYNCHRONOUS)) == NOTHING
    assert machine(offered(1), arrived(1), ev.StopRequested()).handle(offered(2)) == NOTHING
    assert machine(arrived(1), ev.TrainingDone(), max_updates=1).handle(offered(2)) == NOTHING


def test_the_runs_last_version_is_not_downloaded() -> None:
    assert machine().handle(offered(9, done=True)) == GOODBYE["done"]
    assert machine(offered(8)).handle(offered(9, done=True)) == GOODBYE["done"]


def test_a_closed_synchronous_round_is_not_downloaded_to_its_end() -> None:
    worker = machine(offered(1, **SYNCHRONOUS))

    assert worker.handle(offered(2, **SYNCHRONOUS)) == [ev.Download(head_of(2, **SYNCHRONOUS))]
    # Should it arrive all the same, it is of no use.
    assert worker.handle(arrived(1, **SYNCHRONOUS)) == NOTHING
    assert worker.handle(arrived(2, **SYNCHRONOUS)) == [ev.Train(head_of(2, **SYNCHRONOUS), 0)]


def test_a_download_of_an_epoch_that_is_over_is_replaced() -> None:
    worker = machine(offered(7, epoch=1))

    assert worker.handle(offered(3, epoch=2)) == [ev.Download(head_of(3, epoch=2))]
    assert worker.handle(arrived(7, epoch=1)) == NOTHING
    assert worker.handle(arrived(3, epoch=2)) == [ev.Train(head_of(3, epoch=2), 0)]


def test_a_version_in_one_message_needs_no_download() -> None:
    worker = machine(offered(1))

    assert worker.handle(arrived(2)) == [ev.Train(head_of(2), 0)]
    assert worker.handle(arrived(1)) == NOTHING


# ------------------------------------------------------------------------------------------------- beside training


def test_one_version_is_downloaded_beside_a_training_and_a_newer_one_after_it() -> None:
    worker = machine(offered(1), arrived(1))

    assert worker.handle(offered(2)) == [ev.Download(head_of(2))]
    assert worker.handle(offered(3)) == NOTHING
    assert worker.handle(arrived(2)) == NOTHING, "one ahead is enough"
    assert worker.handle(offered(4)) == NOTHING
    assert worker.handle(ev.TrainingDone()) == [ev.Publish(), ev.Download(head_of(4))]
    assert worker.handle(arrived(4)) == [ev.Train(head_of(4), 0)]


def test_what_was_downloaded_beside_a_training_is_trained_from_next() -> None:
    worker = machine(offered(1), arrived(1), offered(2), arrived(2))

    assert worker.handle(ev.TrainingDone()) == [ev.Publish(), ev.Train(head_of(2), 0)]


def test_beside_a_training_and_an_update_on_its_way_nothing_is_downloaded() -> None:
    worker = machine(offered(1), arrived(1), offered(2), arrived(2), ev.TrainingDone())
    assert worker.state is State.TRAINING

    assert worker.handle(offered(3)) == NOTHING
    assert worker.handle(ev.PublishConfirmed()) == [ev.Download(head_of(3))]


def test_beside_a_download_and_an_update_on_its_way_nothing_is_trained() -> None:
    worker = machine(offered(1), arrived(1), offered(2), ev.TrainingDone())
    same = replace(head_of(3), digest=head_of(1).digest)

    assert worker.handle(ev.Offered(same)) == NOTHING
    assert worker.handle(ev.PublishConfirmed()) == [ev.Train(same, 0)]


# ------------------------------------------------------------------------------------------------------- failures


def test_a_download_that_failed_is_tried_again_after_ever_longer_pauses() -> None:
    worker = machine(offered(1))
    pauses = []
    for _ in range(10):
        [pause] = worker.handle(ev.DownloadFailed(head_of(1)))
        assert isinstance(pause, ev.DownloadLater)
        pauses.append(pause.seconds)
        assert worker.state is State.DOWNLOADING
        assert worker.handle(ev.Connected()) == [ev.SayHello(-1)]
        assert worker.handle(offered(1)) == NOTHING
        assert worker.handle(ev.DownloadDue()) == [ev.Download(head_of(1))]

    assert pauses == sorted(pauses)
    assert (pauses[0], pauses[-1]) == (0.5, LONGEST_PAUSE)
    assert worker.handle(arrived(1)) == [ev.Train(head_of(1), 0)]


def test_instead_of_a_version_that_is_lost_a_newer_one_is_downloaded_at_once() -> None:
    worker = machine(offered(1), offered(2))
    assert worker.handle(ev.DownloadFailed(head_of(1))) == [ev.Download(head_of(2))]

    [pause] = worker.handle(ev.DownloadFailed(head_of(2)))
    assert pause == ev.DownloadLater(0.5)
    assert worker.handle(offered(3)) == [ev.Download(head_of(3))]
    assert worker.handle(ev.DownloadDue()) == NOTHING
    assert worker.handle(ev.DownloadFailed(head_of(3))) == [ev.DownloadLater(0.5)]


def test_the_failure_of_a_download_that_was_replaced_means_nothing() -> None:
    worker = machine(offered(7, epoch=1), offered(3, epoch=2))

    assert worker.handle(ev.DownloadFailed(head_of(7, epoch=1))) == NOTHING


# ------------------------------------------------------------------------------------------------- slower than versions


def test_a_worker_that_is_slower_than_the_versions_trains_all_the_same() -> None:
    worker, version, trained = machine(), 0, []
    effects = worker.handle(offered(0))
    for _ in range(20):
        [wanted] = [e.head for e in effects if isinstance(e, ev.Download)]
        for _ in range(3):  # as many as come while it downloads
            version += 1
            assert worker.handle(offered(version)) == NOTHING
        effects = worker.handle(ev.ParametersArrived(wanted))
        trained += [e.head.version for e in effects if isinstance(e, ev.Train)]
        # And while it trains there comes none, or the next is downloaded beside it.
        effects = worker.handle(ev.TrainingDone())
        worker.handle(ev.PublishConfirmed())

    assert len(trained) == 20
    assert trained == sorted(set(trained))


# ------------------------------------------------------------------------------------------------------ invariants


@dataclass
class Shell:
    """What a machine's shell has in hand, counted in sizes of the model."""

    machine: WorkerMachine
    in_one_message: bool
    """Whether some versions come whole: small ones, whose memory nobody counts."""
    base: ParametersHead | None = None
    sending: bool = False
    waits: bool = False
    trainings: list[ev.Train] = field(default_factory=list)

    def tell(self, event: ev.Event) -> None:
        if isinstance(event, ev.TrainingDone):
            self.base, self.waits = None, True
        if isinstance(event, ev.PublishConfirmed):
            self.sending = False
        for effect in self.machine.handle(event):
            match effect:
                case ev.Train(head, _):
                    assert self.base is None, "one training at a time"
                    here = self.machine.versions.here
                    newest = self.machine.versions.newest
                    assert here is not None
                    assert newest is not None
                    assert not newest.plan.paused
                    assert here.digest == head.digest, "only what is here is trained from"
                    assert not self.sending or head.plan.rounds is Rounds.BUFFERED
                    self.base = head
                    self.trainings.append(effect)
                case ev.Publish():
                    assert self.waits, "what is trained is published"
                    assert not self.sending, "one at a time"
                    self.sending, self.waits = True, False
                case ev.Download(head):
                    assert head == self.machine.versions.newest
        assert self.in_one_message or self.memory <= 4, f"{event} made it {self.memory} models"

    @property
    def memory(self) -> int:
        versions = self.machine.versions
        held = {head.digest for head in (self.base, versions.here) if head is not None}
        parts = [self.base, self.sending, self.waits, versions.coming]
        return 1 + len(held) + sum(map(bool, parts))

    def events(self) -> st.SearchStrategy[ev.Event]:
        """What can come now."""
        coming = self.machine.versions.coming
        events: list[ev.Event] = [ev.Connected(), ev.BackOffOver(), ev.RestOver(), ev.DownloadDue()]
        # What moves things on is more likely.
        if self.base is not None:
            events += 4 * [ev.TrainingDone()]
        if self.machine._sending is State.PUBLISHING:
            events += [*(2 * [ev.PublishConfirmed()]), ev.PublishFailed()]
        if coming is not None:
            events += [*(4 * [ev.ParametersArrived(coming)]), ev.DownloadFailed(coming)]
        return st.sampled_from(events) | (VERSIONS if self.in_one_message else OFFERS)


def _version(kind: type, version: int, epoch: int, digest: int, **plan: Any) -> ev.Event:
    event: ev.Event = kind(replace(head_of(version, epoch=epoch, **plan), digest=f"{digest:064x}"))
    return event


def _versions(kinds: list[type]) -> st.SearchStrategy[ev.Event]:
    return st.builds(
        _version,
        st.sampled_from(kinds),
        st.integers(0, 9),
        st.integers(1, 2),
        st.integers(0, 9),
        attempt=st.integers(0, 2),
        updates_per_version=st.integers(1, 3),
        rounds=st.sampled_from([Rounds.BUFFERED, Rounds.BUFFERED, Rounds.SYNCHRONOUS]),
        paused=st.sampled_from([False, False, False, True]),
    )


OFFERS, VERSIONS = _versions([ev.Offered]), _versions([ev.Offered, ev.ParametersArrived])


@settings(max_examples=200)
@given(st.data())
def test_whatever_happens_memory_is_bounded_and_versions_are_trained_in_order(data: st.DataObject) -> None:
    shell = Shell(WorkerMachine("w0", "i0"), in_one_message=data.draw(st.booleans()))
    for turn in range(data.draw(st.integers(0, 40))):
        if data.draw(st.integers(0, 9)) == 0:
            shell.tell(ev.NoticeArrived(Reason.NO_EXAMPLES, UpdateId("w0", "i0", turn)))
        shell.tell(data.draw(shell.events()))

    order = [(t.head.epoch, t.head.version, t.head.plan.attempt) for t in shell.trainings]
    assert order == sorted(order)
    for training in shell.trainings:
        plan = training.head.plan
        assert training.ordinal < (1 if plan.rounds is Rounds.SYNCHRONOUS else plan.updates_per_version)


# -------------------------------------------------------------------------------------------------------- evaluator


def evaluator(*events: ev.Event) -> EvaluatorMachine:
    result = EvaluatorMachine()
    for event in events:
        result.handle(event)
    return result


def test_an_evaluator_downloads_the_next_while_it_evaluates() -> None:
    machine = evaluator()

    assert machine.handle(offered(0)) == [ev.Download(head_of(0))]
    assert machine.state is State.DOWNLOADING
    assert machine.handle(offered(1)) == NOTHING
    assert machine.handle(arrived(0)) == [ev.Evaluate(head_of(0))]
    assert machine.handle(offered(2)) == [ev.Download(head_of(2))]
    assert machine.handle(arrived(2)) == NOTHING
    assert machine.handle(offered(3)) == NOTHING, "one ahead is enough"
    assert machine.handle(ev.EvaluationDone()) == [ev.Evaluate(head_of(2))]
    assert machine.handle(offered(4)) == [ev.Download(head_of(4))]


def test_an_evaluator_on_a_slow_link_gets_versions_of_closed_rounds() -> None:
    machine = evaluator(offered(0, **SYNCHRONOUS))

    assert machine.handle(offered(1, **SYNCHRONOUS)) == NOTHING
    assert machine.handle(arrived(0, **SYNCHRONOUS)) == [ev.Evaluate(head_of(0, **SYNCHRONOUS))]


def test_an_evaluator_downloads_the_last_version_before_it_leaves() -> None:
    machine = evaluator(offered(0), arrived(0), ev.EvaluationDone())

    assert machine.handle(offered(9, done=True)) == [ev.Download(head_of(9, done=True))]
    assert machine.handle(ev.DownloadFailed(head_of(9, done=True))) == [ev.DownloadLater(0.5)]
    assert machine.handle(ev.DownloadDue()) == [ev.Download(head_of(9, done=True))]
    assert machine.handle(arrived(9, done=True)) == [ev.Evaluate(head_of(9, done=True))]
    assert machine.handle(ev.EvaluationDone()) == GOODBYE["done"]


@pytest.mark.parametrize("state", [(), (offered(1),), (offered(1), ev.DownloadFailed(head_of(1)))])
def test_who_downloads_can_be_asked_to_leave(state: tuple[ev.Event, ...]) -> None:
    for waiting in (machine(*state), evaluator(*state)):
        assert waiting.handle(ev.StopRequested()) == GOODBYE["stopped"]
