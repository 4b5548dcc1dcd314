"""The machine of a worker that evaluates: always the newest version, until the run's last."""

from __future__ import annotations

from broker.messages import ParametersHead
from worker_client.core import events as ev
from worker_client.core.machine import State
from worker_client.core.versions import Versions

__all__ = ["EvaluatorMachine"]


class EvaluatorMachine:
    """Decides what an evaluator does next. A version that is overtaken while another is evaluated is skipped.

    One that is downloaded is evaluated even if it was overtaken on its way; the next is downloaded meanwhile.
    """

    def __init__(self) -> None:
        self.versions = Versions(past_rounds=True)
        self.confirmed = 0
        self._work = State.WAITING
        self._evaluated: ParametersHead | None = None
        self._leaving = False

    @property
    def state(self) -> State:
        """What the evaluator is doing, in one word."""
        is_loading = self._work is State.WAITING and self.versions.is_awaited
        return State.DOWNLOADING if is_loading else self._work

    def handle(self, event: ev.Event) -> list[ev.Effect]:  # noqa: PLR0911, PLR0912 - one branch a kind of event
        """Take in one event and say what to do. Raises RuntimeError for an event that cannot come now."""
        if self._work is State.GONE:
            return []
        match event:
            case ev.Connected():
                return [ev.SayHello(self.versions.number)]
            case ev.Offered(head):
                self.versions.offer(head)
                return self._go_on()
            case ev.ParametersArrived(head):
                self.versions.arrive(head)
                return self._go_on()
            case ev.DownloadFailed(head):
                return [*self.versions.fail(head), *self._go_on()]
            case ev.DownloadDue():
                self.versions.end_pause()
                return self._go_on()
            case ev.EvaluationDone() | ev.Abandoned():
                if self._work is not State.EVALUATING:
                    raise RuntimeError(f"{event} in state {self.state}")
                self._work = State.WAITING
                return self._exit("stopped") if self._leaving else self._go_on()
            case ev.StopRequested():
                self._leaving = True
                return [ev.Abandon()] if self._work is State.EVALUATING else self._exit("stopped")
            case ev.GraceOver():
                return self._exit("stopped") if self._leaving else []
            case ev.Failed(detail):
                self._work = State.GONE
                return [ev.SayGoodbye(detail), ev.Exit("failed")]
            case ev.BackOffOver() | ev.RestOver() | ev.NoticeArrived():
                return []
            case _:
                raise RuntimeError(f"an evaluator knows no {event}")

    def _go_on(self) -> list[ev.Effect]:
        """Evaluate what is here, download what is newer, or leave after the last."""
        newest, here = self.versions.newest, self.versions.here
        if newest is None or self._leaving:
            return []
        if self._work is State.EVALUATING:
            has_next = here is newest or not self._is_evaluated(here)
            return [] if has_next or self._is_evaluated(newest) else self.versions.download()
        if here is not None and not self._is_evaluated(here):
            self._work, self._evaluated = State.EVALUATING, here
            return [ev.Evaluate(here)]
        if self._is_evaluated(newest):
            return self._exit("done") if newest.plan.done else []
        return self.versions.download()

    def _is_evaluated(self, head: ParametersHead | None) -> bool:
        # A restart of the aggregator or another attempt tells the same version again.
        last = self._evaluated
        return head is None or (last is not None and (head.version, head.digest) == (last.version, last.digest))

    def _exit(self, reason: str) -> list[ev.Effect]:
        self._work = State.GONE
        return [ev.SayGoodbye(reason), ev.Exit(reason)]
