"""A view that any thread may feed and read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from broker.errors import FedmqError, WireError
from broker.messages import Event, EventKind
from broker.transport import Delivery, Failed, Incoming
from broker.wire import decode
from fedmq.monitoring.facts import BrokerFacts
from fedmq.monitoring.log import Entry
from fedmq.monitoring.view import View

__all__ = ["Monitor"]


class Monitor:
    """One run, watched. :meth:`take` is a sink for the events of a transport or of ``AmqpWatch``."""

    def __init__(self, run: str) -> None:
        """Nothing is known yet."""
        self.run = run
        self.failure: FedmqError | None = None
        """Why no events will come any more, if that is so."""
        self._view = View(run)
        self._changed = threading.Condition()
        self._changes = 0
        self._wall = time.time() - time.monotonic()

    def now(self) -> float:
        """Seconds since 1970 that never fall."""
        return self._wall + time.monotonic()

    # ------------------------------------------------------------------------------------- what goes in

    def take(self, item: Incoming) -> None:
        """A sink; whatever is no event of this run, or comes under another's name, is passed over."""
        if isinstance(item, Failed):
            self.fail(item.error)
        if not isinstance(item, Delivery):
            return
        try:
            event = decode(item.body)
        except WireError:
            return
        if not isinstance(event, Event) or event.run != self.run or event.kind is EventKind.NOTICE:
            return
        # Under whose name somebody may publish is for the broker to say, which knows the key and not the body.
        key = item.headers.get("key")
        if key is None or key == f"{event.run}.{event.kind}.{event.source}":
            self._do(lambda view, now: view.take(event, now))

    def observe(self, facts: BrokerFacts) -> None:
        """Take in what the broker says now."""
        self._do(lambda view, now: view.observe(facts, now))

    def expect(self, worker: str, state: str) -> None:
        """Show ``worker`` with ``state`` until it is heard."""
        self._do(lambda view, _now: view.expect(worker, state))

    def lack(self, source: str, text: str) -> None:
        """What cannot be known by ``source``, and why; an empty text takes that back."""
        self._do(lambda view, _now: view.missing.update({source: text}))

    def fail(self, error: FedmqError) -> None:
        """No events will come any more."""
        self.failure = error
        self.lack("events", f"no events: {error}")

    def tick(self) -> None:
        """Let time pass; about once a second."""
        self._do(lambda view, now: view.tick(now))

    def _do(self, change: Callable[[View, float], None]) -> None:
        with self._changed:
            change(self._view, self.now())
            self._changes += 1
            self._changed.notify_all()

    # ------------------------------------------------------------------------------------ what comes out

    @property
    def changes(self) -> int:
        """Counts up with whatever goes in."""
        return self._changes

    def wait_change(self, after: int, timeout: float) -> int:
        """Wait until :attr:`changes` is above ``after``, ``timeout`` seconds at most; the count then."""
        with self._changed:
            self._changed.wait_for(lambda: self._changes > after, timeout)
            return self._changes

    def wait_complete(self, timeout: float) -> bool:
        """Whether all that the active aggregator tells has come, in ``timeout`` seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._view.is_complete or self.failure is not None, timeout)
            return self._view.is_complete

    @property
    def is_absent(self) -> bool:
        """Whether the broker knows nothing of the run, and nobody was heard."""
        with self._changed:
            return self._view.facts.is_declared is False and self._view.is_unheard

    @property
    def state(self) -> str:
        """See :meth:`View.state`."""
        with self._changed:
            return self._view.state(self.now())

    @property
    def version(self) -> int:
        """The newest that was heard of."""
        return self._view.version

    @property
    def rounds(self) -> int | None:
        """After which the run ends."""
        return self._view.rounds

    @rounds.setter
    def rounds(self, rounds: int | None) -> None:
        with self._changed:
            self._view.rounds = rounds

    def snapshot(self) -> dict[str, Any]:
        """See :meth:`View.snapshot`."""
        with self._changed:
            return self._view.snapshot(self.now())

    def series(self) -> dict[str, dict[str, list[Any]]]:
        """See :meth:`View.series`."""
        with self._changed:
            return self._view.series()

    def log(self, since: int = 0) -> list[Entry]:
        """See :meth:`View.log`."""
        with self._changed:
            return self._view.log(since)
