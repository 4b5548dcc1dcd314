"""The machine of a worker that evaluates: always the newest version, until the run's last."""

from __future__ import annotations

from broker.messages import ParametersHead
from worker_client.core import events as ev
from worker_client.core.machine import State, is_newer

__all__ = ["EvaluatorMachine"]


class EvaluatorMachine:
    """Decides what an evaluator does next. A version that is overtaken while another is evaluated is skipped."""

    def __init__(self) -> None:
        self.state = State.WAITING
        self.newest: ParametersHead | None = None
        self.confirmed = 0
        self._evaluated: ParametersHead | None = None
        self._leaving = False

    def handle(self, event: ev.Event) -> list[ev.Effect]:  # noqa: PLR0911 - one branch a kind of event
        """Take in one event and say what to do. Raises RuntimeError for an event that cannot come now."""
        if self.state is State.GONE:
            return []
        match event:
            case ev.Connected():
                return [ev.SayHello(self.newest.version if self.newest else -1)]
            case ev.ParametersArrived(head):
                if is_newer(head, self.newest):
                    self.newest = head
                return self._next() if self.state is State.WAITING else []
            case ev.EvaluationDone() | ev.Abandoned():
                if self.state is not State.EVALUATING:
                    raise RuntimeError(f"{event} in state {self.state}")
                return self._exit("stopped") if self._leaving else self._next()
            case ev.StopRequested():
                self._leaving = True
                return [ev.Abandon()] if self.state is State.EVALUATING else self._exit("stopped")
            case ev.GraceOver():
                return self._exit("stopped") if self._leaving else []
            case ev.Failed(detail):
                self.state = State.GONE
                return [ev.SayGoodbye(detail), ev.Exit("failed")]
            case ev.BackOffOver() | ev.RestOver() | ev.NoticeArrived():
                return []
            case _:
                raise RuntimeError(f"an evaluator knows no {event}")

    def _next(self) -> list[ev.Effect]:
        self.state = State.WAITING
        head, last = self.newest, self._evaluated
        if head is None:
            return []
        # A restart of the aggregator or another attempt tells the same version again.
        if last is None or (head.version, head.digest) != (last.version, last.digest):
            self._evaluated = head
            self.state = State.EVALUATING
            return [ev.Evaluate(head)]
        return self._exit("done") if head.plan.done else []

    def _exit(self, reason: str) -> list[ev.Effect]:
        self.state = State.GONE
        return [ev.SayGoodbye(reason), ev.Exit(reason)]
