"""The machine of a worker that trains: pull, train, publish, publish again.

    WAITING ──Download──▶ DOWNLOADING ──arrived──▶ WAITING
    WAITING ──Train──▶ TRAINING ──an update, or abandoned──▶ WAITING
    WAITING ──Evaluate──▶ EVALUATING ──done, or abandoned──▶ WAITING
    WAITING ──Rest──▶ RESTING ──its time is over──▶ WAITING            any state ──Exit──▶ GONE

and beside it, with an update in hand:

    Publish ──▶ PUBLISHING ──confirmed──▶ Publish the update that waits behind it, if there is one
                  │      ▲
                failed   │ PublishAgain: time is over, or a new connection
                  ▼      │
                BACKING_OFF

A worker whose update was rejected for what it holds is RESTING for a while before it trains again; the longer, the
more were rejected in a row. Of several states at once, the heartbeats say the one that comes first: RESTING or
TRAINING, then PUBLISHING or BACKING_OFF, then DOWNLOADING.

In buffered rounds the next training begins while the update before it is being published; one update is published at
a time, and one that is trained waits behind it. In synchronous rounds the one is over before the other begins.

A newer version that is offered in mid-training does not stop the training: that is what staleness is for. A worker
that waits downloads the newest rather than train from an older one; but what arrives while it waits it trains from
at once, even if it was overtaken on its way, or a slow worker would only ever download.

Where the plan asks for it, a worker that holds data out evaluates a version before it trains from it, and the run's
last version before it leaves.

Memory, in sizes M of the model: the model M, its gradients M while it trains, the version that it trains from M, and
what is published M. So a download, which takes M as well, runs beside a training only if nothing is published, and
beside an update that is published only if nothing is trained; and nothing is trained while two updates are in hand.

Time and chance come from outside; nothing here does I/O.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

from broker.messages import ParametersHead, Reason, Rounds, UpdateId
from worker_client.core import events as ev
from worker_client.core.checks import Checks
from worker_client.core.rejections import Rejections
from worker_client.core.versions import Versions

__all__ = ["State", "WorkerMachine"]

#: Rejections that would meet every further update of this process too; going on would only burn energy.
HOPELESS = frozenset({Reason.UNKNOWN_FORMAT, Reason.NOT_SUPPORTED, Reason.WRONG_RUN, Reason.MODEL_MISMATCH})
FIRST_BACK_OFF = 0.5
LONGEST_BACK_OFF = 30.0


class State(StrEnum):
    """What the worker is doing; the words stand in its heartbeats."""

    WAITING = "waiting"
    DOWNLOADING = "downloading"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"
    BACKING_OFF = "backing-off"
    RESTING = "resting"
    GONE = "gone"


#: States in which the thread that trains has something to do.
BUSY = frozenset({State.TRAINING, State.EVALUATING})


class WorkerMachine:
    """Decides what a training worker does next.

    Args:
        worker: the worker's name, by which synchronous rounds sample it.
        incarnation: this life of the worker, to tell its own rejected updates from a predecessor's.
        max_updates: leave after so many confirmed updates.
        can_check: whether it holds data out to evaluate versions with.
    """

    def __init__(
        self, worker: str, incarnation: str, *, max_updates: int | None = None, can_check: bool = False
    ) -> None:
        self.versions = Versions()
        self.confirmed = 0
        self._worker = worker
        self._incarnation = incarnation
        self._max_updates = max_updates
        self._checks = Checks(can=can_check)
        self._work = State.WAITING
        self._sending: State | None = None
        self._waits_behind = False
        self._base: ParametersHead | None = None
        self._round: tuple[int, int, int] | None = None
        self._trained_in_round = 0
        self._failures = 0
        self._rejections = Rejections()
        self._rest_owed = False
        self._leaving: str | None = None

    @property
    def state(self) -> State:
        """What the worker is doing, in one word."""
        if self._work is not State.WAITING:
            return self._work
        return self._sending or (State.DOWNLOADING if self.versions.is_awaited else State.WAITING)

    def resume(self) -> None:
        """An update of a former life is to be published first of all. Before the first event."""
        self._sending = State.BACKING_OFF

    def handle(self, event: ev.Event) -> list[ev.Effect]:  # noqa: PLR0911, PLR0912 - one branch a kind of event
        """Take in one event and say what to do. Raises RuntimeError for an event that cannot come now."""
        if self._work is State.GONE:
            return []
        match event:
            case ev.Connected():
                return [self._hello(), *self._publish_again()]
            case ev.Offered(head) | ev.ParametersArrived(head):
                return self._told(head, is_here=isinstance(event, ev.ParametersArrived))
            case ev.DownloadFailed(head):
                if self._leaving:
                    self._checks.stop()
                    return self._settle(self._leaving)
                return [*self.versions.fail(head), *self._go_on()]
            case ev.DownloadDue():
                self.versions.end_pause()
                return self._go_on()
            case ev.TrainingDone():
                self._expect(State.TRAINING, event)
                return self._trained()
            case ev.EvaluationDone():
                self._expect(State.EVALUATING, event)
                self._work = State.WAITING
                return self._settle(self._leaving) if self._leaving else self._go_on()
            case ev.Abandoned():
                self._expect(self._work if self._work in BUSY else State.TRAINING, event)
                self._work = State.WAITING
                self._leaving = self._leaving or "stopped"
                return self._settle(self._leaving)
            case ev.PublishConfirmed():
                self._expect(State.PUBLISHING, event)
                return self._published()
            case ev.PublishFailed(lacks_outbox):
                self._expect(State.PUBLISHING, event)
                return [*([self._hello()] if lacks_outbox else []), *self._refused()]
            case ev.BackOffOver():
                return self._publish_again()
            case ev.RestOver():
                return self._rested() if self._work is State.RESTING else []
            case ev.NoticeArrived(reason, update):
                ours = (update.worker, update.incarnation) == (self._worker, self._incarnation)
                return self._rejected(reason, update) if ours else []
            case ev.StopRequested():
                self._checks.stop()
                return self._leave("stopped")
            case ev.GraceOver():
                return self._exit(self._leaving) if self._leaving else []
            case ev.Failed(detail):
                return self._fail(detail)
            case _:
                raise RuntimeError(f"a training worker knows no {event}")

    def _expect(self, state: State, event: ev.Event) -> None:
        if state not in {self._work, self._sending}:
            raise RuntimeError(f"{event} in state {self.state}")

    def _hello(self) -> ev.Effect:
        return ev.SayHello(self.versions.number)

    def _told(self, head: ParametersHead, *, is_here: bool) -> list[ev.Effect]:
        is_of_use = (self.versions.arrive if is_here else self.versions.offer)(head)
        if is_of_use and head.plan.done:
            return self._settle("done") if self._leaving == "done" else self._leave("done")
        return self._go_on(arrived=is_of_use and is_here)

    # ---------------------------------------------------------------------------------------------- training

    def _go_on(self, *, arrived: bool = False) -> list[ev.Effect]:
        """Rest, download or train, if anything of that is next; ``arrived``: a version just did."""
        newest = self.versions.newest
        if self._leaving or self._waits_behind or self._work in {State.RESTING, State.EVALUATING}:
            return []
        if self._rest_owed and self._work is State.WAITING:
            self._rest_owed, self._work = False, State.RESTING
            return [ev.Rest(self._spread(self._rejections.rest, self._rejections.in_a_row))]
        if newest is None or newest.plan.paused:
            return []
        return self._look_ahead(newest) if self._work is State.TRAINING else self._begin(newest, arrived=arrived)

    def _begin(self, newest: ParametersHead, *, arrived: bool) -> list[ev.Effect]:
        """Train, or download what to train from, if the plan allows this worker one more update."""
        head, here = newest, self.versions.here
        is_overtaken = arrived and here is not newest and newest.plan.rounds is Rounds.BUFFERED
        if is_overtaken and here is not None and self._is_asked(here):
            head = here
        if not self._is_asked(head):
            return []
        if head is not here:
            return self.versions.download()
        if self._sending and (head.plan.rounds is Rounds.SYNCHRONOUS or self.versions.coming):
            return []
        return self._check(head) if self._checks.is_due(head) else self._train(head)

    def _check(self, head: ParametersHead) -> list[ev.Effect]:
        self._checks.begin(head)
        self._work, self._base = State.EVALUATING, head
        return [ev.Evaluate(head)]

    def _look_ahead(self, newest: ParametersHead) -> list[ev.Effect]:
        """Download one version beside the training, if nothing is published."""
        here, base = self.versions.here, self._base
        has_next = here is not None and base is not None and here.digest != base.digest
        if self._sending or has_next or here is newest or not self._is_asked(newest):
            return []
        return self.versions.download()

    def _is_asked(self, head: ParametersHead) -> bool:
        """Whether the plan allows this worker one more update for ``head``."""
        plan = head.plan
        in_hand = [self._sending, self._waits_behind, self._work is State.TRAINING]
        if self._max_updates is not None and self.confirmed + sum(map(bool, in_hand)) >= self._max_updates:
            return False
        if plan.rounds is Rounds.SYNCHRONOUS and not plan.is_sampled(self._worker, head.version):
            return False
        allowance = 1 if plan.rounds is Rounds.SYNCHRONOUS else plan.updates_per_version
        return self._round != _round_of(head) or self._trained_in_round < allowance

    def _train(self, head: ParametersHead) -> list[ev.Effect]:
        if self._round != _round_of(head):
            self._round, self._trained_in_round = _round_of(head), 0
        ordinal = self._trained_in_round
        self._trained_in_round += 1
        self._work, self._base = State.TRAINING, head
        return [ev.Train(head, ordinal)]

    def _trained(self) -> list[ev.Effect]:
        self._work = State.WAITING
        if self._leaving == "done":
            return self._settle("done")
        if self._sending:
            self._waits_behind = True
            return []
        return [*self._publish(), *self._go_on()]

    # -------------------------------------------------------------------------------------------- publishing

    def _publish(self) -> list[ev.Effect]:
        self._sending = State.PUBLISHING
        self._failures = 0
        return [ev.Publish()]

    def _published(self) -> list[ev.Effect]:
        self.confirmed += 1
        self._sending = None
        effects: list[ev.Effect] = []
        if self._waits_behind:
            self._waits_behind = False
            effects = self._publish()
        if self._leaving:
            return effects + self._settle(self._leaving)
        if self._max_updates is not None and self.confirmed >= self._max_updates:
            return self._exit("limit")
        return effects + self._go_on()

    def _refused(self) -> list[ev.Effect]:
        if self._leaving == "done":
            self._sending = None
            return self._settle("done")
        self._sending = State.BACKING_OFF
        self._failures += 1
        longest = min(LONGEST_BACK_OFF, FIRST_BACK_OFF * 2 ** min(self._failures - 1, 10))
        return [ev.BackOff(self._spread(longest, self._failures))]

    def _publish_again(self) -> list[ev.Effect]:
        if self._sending is not State.BACKING_OFF:
            return []
        self._sending = State.PUBLISHING
        return [ev.PublishAgain()]

    def _spread(self, longest: float, attempt: int) -> float:
        # Lest all workers come back to a full queue at once; by hash, for want of randomness here.
        draw = hashlib.sha256(f"{self._worker}:{self._incarnation}:{attempt}".encode()).digest()[0] / 256
        return longest * (0.5 + draw / 2)

    def _rejected(self, reason: Reason, update: UpdateId) -> list[ev.Effect]:
        if reason in HOPELESS:
            return self._fail(f"update {update} rejected: {reason}")
        self._rest_owed |= self._rejections.add(reason, update.seq)
        if self._rejections.has_diverged:
            return self._exit("diverged")
        # What is trained just now takes its course; the rest comes before the next training.
        return self._rested() if self._rest_owed and self._work in {State.WAITING, State.RESTING} else []

    def _rested(self) -> list[ev.Effect]:
        self._work = State.WAITING
        return self._go_on()

    # ----------------------------------------------------------------------------------------------- leaving

    def _leave(self, reason: str) -> list[ev.Effect]:
        if self._leaving == reason:
            return []
        # "done" outranks "stopped": what is trained or half published for a finished run is of no use.
        self._leaving = "done" if "done" in {self._leaving, reason} else reason
        if self._leaving == "done":
            self._waits_behind = False
            self._sending = None if self._sending is State.BACKING_OFF else self._sending
        abandon: list[ev.Effect] = [ev.Abandon()] if self._work in BUSY else []
        return abandon + self._settle(self._leaving)

    def _settle(self, reason: str) -> list[ev.Effect]:
        """Exit, once nothing is in hand, and the run's last version is evaluated if that is asked for."""
        if self._work in BUSY or self._sending:
            return []
        newest = self.versions.newest
        if reason == "done" and newest is not None and newest.plan.done and self._checks.is_due(newest):
            return self._check(newest) if self.versions.here is newest else self.versions.download()
        return self._exit(reason)

    def _fail(self, detail: str) -> list[ev.Effect]:
        self._work = State.GONE
        return [ev.SayGoodbye(detail), ev.Exit("failed")]

    def _exit(self, reason: str) -> list[ev.Effect]:
        self._work = State.GONE
        return [ev.SayGoodbye(reason), ev.Exit(reason)]


def _round_of(head: ParametersHead) -> tuple[int, int, int]:
    # With the epoch: an aggregator that came back may not know that it rejected this worker's update, or may come
    # from an older copy. And it may ask again. Whose update is in stands in the plan.
    return head.epoch, head.version, head.plan.asked
