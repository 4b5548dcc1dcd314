"""The port for whoever counts what a worker does. This one counts nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from broker.messages import Reason, UpdateId
from worker_client.core import events as ev
from worker_client.mailbox import Item

__all__ = ["Meter", "Meters", "Standing"]


@dataclass(frozen=True, slots=True)
class Standing:
    """How a worker stands at a moment."""

    state: str
    version: int
    """The newest that it knows of; -1 if none."""
    confirmed: int
    """Updates that the broker confirmed to this process."""
    outstanding: int
    """Updates that are trained and not confirmed."""
    refused: int = 0
    """Messages in the aggregator's name that were not believed."""


class Meter:
    """What a worker's session tells, on its one thread; a subclass makes figures of it."""

    def watch(self, standing: Callable[[], Standing], model_bytes: int) -> None:
        """The session begins, with a model of this size; ``standing`` may be called on any thread."""

    def receives(self, item: Item) -> None:
        """``item`` was taken from the mailbox, and is about to be looked at."""

    def does(self, effect: ev.Effect) -> None:
        """``effect`` is about to be performed."""

    def rejected(self, reason: Reason) -> None:
        """The aggregator told that it has rejected an update."""

    def headers(self, update: UpdateId) -> Mapping[str, str | int]:
        """What goes with ``update``, which is encoded and about to be sent, for whoever follows it."""
        del update
        return {}


class Meters(Meter):
    """Several, each told everything."""

    def __init__(self, *meters: Meter) -> None:
        self._meters = meters

    def watch(self, standing: Callable[[], Standing], model_bytes: int) -> None:
        """See the port."""
        for meter in self._meters:
            meter.watch(standing, model_bytes)

    def receives(self, item: Item) -> None:
        """See the port."""
        for meter in self._meters:
            meter.receives(item)

    def does(self, effect: ev.Effect) -> None:
        """See the port."""
        for meter in self._meters:
            meter.does(effect)

    def rejected(self, reason: Reason) -> None:
        """See the port."""
        for meter in self._meters:
            meter.rejected(reason)

    def headers(self, update: UpdateId) -> Mapping[str, str | int]:
        """See the port."""
        return {name: value for meter in self._meters for name, value in meter.headers(update).items()}
