"""The port for whoever counts what an aggregator does. This one counts nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.reign import Reign
from broker.transport import Delivery

__all__ = ["Meter", "Meters"]


class Meter:
    """What the service tells, on its one thread; a subclass makes figures of it.

    One meter may hear of several services, one after the other: an aggregator that is superseded stands by anew.
    """

    decode: AbstractContextManager[object] = nullcontext()
    """Surrounds the reading of an update."""

    def watch(self, leads: Callable[[], bool]) -> None:
        """A service begins; ``leads`` says, on any thread, whether the broker has it for the active one."""

    def reigns(self, reign: Reign) -> None:
        """It has claimed the run."""

    def received(self, delivery: Delivery, event: on.Happening) -> None:
        """A delivery of updates came, which was read as ``event``."""

    def records(self, fact: do.Fact, version: int) -> None:
        """``fact`` happened while ``version`` was the newest."""

    def writing(self, outcome: Future[on.CheckpointWritten | on.CheckpointFailed | None]) -> None:
        """A checkpoint was handed over to be written."""

    def broadcasting(self, sent: Future[None], nbytes: int) -> None:
        """A version of ``nbytes`` was handed over to be sent."""


class Meters(Meter):
    """Several, each told everything."""

    def __init__(self, *meters: Meter) -> None:
        self._meters = meters
        self.decode = _Together([meter.decode for meter in meters])

    def watch(self, leads: Callable[[], bool]) -> None:
        """See the port."""
        for meter in self._meters:
            meter.watch(leads)

    def reigns(self, reign: Reign) -> None:
        """See the port."""
        for meter in self._meters:
            meter.reigns(reign)

    def received(self, delivery: Delivery, event: on.Happening) -> None:
        """See the port."""
        for meter in self._meters:
            meter.received(delivery, event)

    def records(self, fact: do.Fact, version: int) -> None:
        """See the port."""
        for meter in self._meters:
            meter.records(fact, version)

    def writing(self, outcome: Future[on.CheckpointWritten | on.CheckpointFailed | None]) -> None:
        """See the port."""
        for meter in self._meters:
            meter.writing(outcome)

    def broadcasting(self, sent: Future[None], nbytes: int) -> None:
        """See the port."""
        for meter in self._meters:
            meter.broadcasting(sent, nbytes)


class _Together(AbstractContextManager[object]):
    """Several contexts, entered again and again."""

    def __init__(self, parts: Sequence[AbstractContextManager[object]]) -> None:
        self._parts = parts

    def __enter__(self) -> object:
        for part in self._parts:
            part.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for part in reversed(self._parts):
            part.__exit__(kind, error, trace)
