"""The machine of a worker that trains: pull, train, publish, publish again.

    WAITING ──Train──▶ TRAINING ──Publish──▶ PUBLISHING ──confirmed──▶ WAITING (and on at once, if allowed)
                           │                  │      ▲
                           │                failed   │ PublishAgain: time is over, or a new connection
                           │                  ▼      │
                           └──abandoned    BACKING_OFF          any state ──Exit──▶ GONE

A worker whose update was rejected for what it holds is RESTING for a while before it trains again, in place of
WAITING; the longer, the more were rejected in a row.

One update is in hand at any time. A newer version that arrives in mid-training does not stop the training:
that is what staleness is for. Time and chance come from outside; nothing here does I/O.
"""

from __future__ import annotations

import hashlib
from enum import StrEnum

from broker.messages import ParametersHead, Reason, Rounds, UpdateId
from worker_client.core import events as ev
from worker_client.core.rejections import Rejections

__all__ = ["State", "WorkerMachine", "is_newer"]

#: Rejections that would meet every further update of this process too; going on would only burn energy.
HOPELESS = frozenset({Reason.UNKNOWN_FORMAT, Reason.NOT_SUPPORTED, Reason.WRONG_RUN, Reason.WRONG_WORKER}) | {
    Reason.MODEL_MISMATCH
}
FIRST_BACK_OFF = 0.5
LONGEST_BACK_OFF = 30.0


class State(StrEnum):
    """What the worker is doing; the words stand in its heartbeats."""

    WAITING = "waiting"
    TRAINING = "training"
    EVALUATING = "evaluating"
    PUBLISHING = "publishing"
    BACKING_OFF = "backing-off"
    RESTING = "resting"
    GONE = "gone"


def is_newer(head: ParametersHead, than: ParametersHead | None) -> bool:
    """Whether ``head`` replaces ``than``: a higher epoch, then version, then attempt; or another plan for it.

    A lower epoch never does: its aggregator was replaced, and what it still says is void.
    """
    if than is None:
        return True
    mine, other = ((h.epoch, h.version, h.plan.attempt) for h in (head, than))
    return mine > other or (mine == other and head != than)


class WorkerMachine:
    """Decides what a training worker does next.

    Args:
        worker: the worker's name, by which synchronous rounds sample it.
        incarnation: this life of the worker, to tell its own rejected updates from a predecessor's.
        max_updates: leave after so many confirmed updates.
    """

    def __init__(self, worker: str, incarnation: str, *, max_updates: int | None = None) -> None:
        self.state = State.WAITING
        self.newest: ParametersHead | None = None
        self.confirmed = 0
        self._worker = worker
        self._incarnation = incarnation
        self._max_updates = max_updates
        self._round: tuple[int, int, int] | None = None
        self._trained_in_round = 0
        self._failures = 0
        self._rejections = Rejections()
        self._rest_owed = False
        self._leaving: str | None = None

    def handle(self, event: ev.Event) -> list[ev.Effect]:  # noqa: PLR0911, PLR0912 - one branch a kind of event
        """Take in one event and say what to do. Raises RuntimeError for an event that cannot come now."""
        if self.state is State.GONE:
            return []
        match event:
            case ev.Connected():
                hello = ev.SayHello(self.newest.version if self.newest else -1)
                return [hello, *self._publish_again()]
            case ev.ParametersArrived(head):
                return self._arrived(head)
            case ev.TrainingDone():
                self._expect(State.TRAINING, event)
                return self._trained()
            case ev.Abandoned():
                self._expect(State.TRAINING, event)
                return self._exit(self._leaving or "stopped")
            case ev.PublishConfirmed():
                self._expect(State.PUBLISHING, event)
                return self._published()
            case ev.PublishFailed():
                self._expect(State.PUBLISHING, event)
                return self._refused()
            case ev.BackOffOver():
                return self._publish_again()
            case ev.RestOver():
                return self._next() if self.state is State.RESTING else []
            case ev.NoticeArrived(reason, update):
                ours = (update.worker, update.incarnation) == (self._worker, self._incarnation)
                return self._rejected(reason, update) if ours else []
            case ev.StopRequested():
                return self._leave("stopped")
            case ev.GraceOver():
                return self._exit(self._leaving) if self._leaving else []
            case ev.Failed(detail):
                return self._fail(detail)
            case _:
                raise RuntimeError(f"a training worker knows no {event}")

    def _expect(self, state: State, event: ev.Event) -> None:
        if self.state is not state:
            raise RuntimeError(f"{event} in state {self.state}")

    def _arrived(self, head: ParametersHead) -> list[ev.Effect]:
        if not is_newer(head, self.newest):
            return []
        self.newest = head
        if head.plan.done:
            return self._leave("done")
        return self._next() if self.state is State.WAITING else []

    def _next(self) -> list[ev.Effect]:
        """Train from the newest version if the plan allows this worker one more update for it."""
        self.state = State.WAITING
        head = self.newest
        if head is None:
            return []
        plan = head.plan
        if self._rest_owed:
            self._rest_owed = False
            self.state = State.RESTING
            return [ev.Rest(self._spread(self._rejections.rest, self._rejections.in_a_row))]
        if plan.paused:
            return []
        if plan.rounds is Rounds.SYNCHRONOUS and not plan.is_sampled(self._worker, head.version):
            return []
        allowance = 1 if plan.rounds is Rounds.SYNCHRONOUS else plan.updates_per_version
        # With the epoch: an aggregator that came back may not know that it rejected this worker's update, or may
        # come from an older copy. And it may ask again. Whose update is in stands in the plan.
        this_round = (head.epoch, head.version, plan.asked)
        if this_round != self._round:
            self._round, self._trained_in_round = this_round, 0
        if self._trained_in_round >= allowance:
            return []
        ordinal = self._trained_in_round
        self._trained_in_round += 1
        self.state = State.TRAINING
        return [ev.Train(head, ordinal)]

    def _trained(self) -> list[ev.Effect]:
        if self._leaving == "done":
            return self._exit("done")
        self.state = State.PUBLISHING
        self._failures = 0
        return [ev.Publish()]

    def _published(self) -> list[ev.Effect]:
        self.confirmed += 1
        if self._leaving:
            return self._exit(self._leaving)
        if self._max_updates is not None and self.confirmed >= self._max_updates:
            return self._exit("limit")
        return self._next()

    def _refused(self) -> list[ev.Effect]:
        if self._leaving == "done":
            return self._exit("done")
        self.state = State.BACKING_OFF
        self._failures += 1
        longest = min(LONGEST_BACK_OFF, FIRST_BACK_OFF * 2 ** min(self._failures - 1, 10))
        return [ev.BackOff(self._spread(longest, self._failures))]

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
        # What is trained or published just now takes its course; the rest comes before the next training.
        return self._next() if self._rest_owed and self.state in {State.WAITING, State.RESTING} else []

    def _publish_again(self) -> list[ev.Effect]:
        if self.state is not State.BACKING_OFF:
            return []
        self.state = State.PUBLISHING
        return [ev.PublishAgain()]

    def _leave(self, reason: str) -> list[ev.Effect]:
        if self._leaving == reason:
            return []
        # "done" outranks "stopped": what is trained or half published for a finished run is of no use.
        self._leaving = "done" if "done" in {self._leaving, reason} else reason
        if self.state is State.TRAINING:
            return [ev.Abandon()]
        if self.state is State.PUBLISHING or (self.state is State.BACKING_OFF and self._leaving != "done"):
            return []
        return self._exit(self._leaving)

    def _fail(self, detail: str) -> list[ev.Effect]:
        self.state = State.GONE
        return [ev.SayGoodbye(detail), ev.Exit("failed")]

    def _exit(self, reason: str) -> list[ev.Effect]:
        self.state = State.GONE
        return [ev.SayGoodbye(reason), ev.Exit(reason)]
