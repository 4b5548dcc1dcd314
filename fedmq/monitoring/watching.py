"""Where a monitor's news come from: the events of a run, and what its broker can be asked.

Three threads beside the caller's: the connection's, one that looks about once a second how full the queues are, and one
that asks the management API, which may be away, slow, of another version, or refuse. None of them waits for another.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from dataclasses import replace
from types import TracebackType
from typing import Self

from broker.admin import Admin
from broker.amqp.watch import AmqpWatch, Depth
from broker.errors import BrokerError, BrokerUnreachable
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import order_of
from fedmq.monitoring.broker import COLUMNS, alarms_of, by_amqp, by_management, purposes
from fedmq.monitoring.facts import BrokerFacts
from fedmq.monitoring.monitor import Monitor

__all__ = ["Watching", "watching"]

#: Between two looks at the queues, and between two questions to the management API: its figures are renewed every five
#: seconds.
LOOK_SECONDS = 1.0
ASK_SECONDS = 3.0
#: After one that failed.
PAUSE_SECONDS = 10.0
#: Longest wait for one answer of the API.
ANSWER_SECONDS = 2.0
#: Answers that are older are not shown.
OLD_SECONDS = 15.0
#: With no aggregator heard for so long, the stream of versions is asked for the newest; and again after a while.
NEWEST_AFTER = 2.0
NEWEST_EVERY = 30.0
#: Longest wait for a look that is on its way, when the block is left.
LEAVE_SECONDS = 2.0
#: For so long it is tried again at least to connect to a broker that refuses, or is not there.
TRIES_SECONDS = 3.0


class Watching:
    """A run, watched from when the block is entered until it is left. Entering returns at once, connected or not."""

    def __init__(self, config: BrokerConfig, run: str) -> None:
        """Raises :class:`ConfigError` if no run can have this name."""
        self.monitor = Monitor(run)
        #: Set when the management API has answered, or failed, and when the queues were looked at.
        self.asked, self.looked = threading.Event(), threading.Event()
        self._sought = threading.Event()
        self._topology = Topology(run)
        self._watch = AmqpWatch(config, self._topology)
        self._admin = Admin.of(config, timeout=ANSWER_SECONDS)
        self._stop = threading.Event()
        self._threads = [
            threading.Thread(target=work, name=f"fedmq-{name}", daemon=True)
            for name, work in (("looking", self._keep_looking), ("asking", self._keep_asking))
        ]
        self._lock = threading.Lock()
        self._by_amqp = BrokerFacts()
        self._by_management = BrokerFacts()
        self._answered: float | None = None
        self._refusal = "it has not answered yet"
        self._looking: Future[dict[str, Depth | None]] | None = None
        self._seeking: Future[Mapping[str, str | int] | None] | None = None
        self._newest: Mapping[str, str | int] | None = None
        self._seek_at = time.monotonic() + NEWEST_AFTER

    def __enter__(self) -> Self:
        self._watch.open(self.monitor.take)
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        # First: who looks must not find the connection closed. Who asks may be waiting for an answer that never comes.
        self._threads[0].join()
        for one in (self._looking, self._seeking):
            with suppress(BrokerError, CancelledError, TimeoutError):
                if one is not None:
                    one.result(LEAVE_SECONDS)
        self._watch.close()

    def await_connection(self, timeout: float) -> None:
        """Wait until a connection stands.

        Raises :class:`BrokerUnreachable` after ``timeout`` seconds, or some tries that failed sooner; or what made
        connecting pointless.
        """
        begun = time.monotonic()
        while not self._watch.up.done():
            waited = time.monotonic() - begun
            if waited >= timeout or (self._watch.problem and waited >= TRIES_SECONDS):
                problem = self._watch.problem or "no answer"
                raise BrokerUnreachable(f"no connection to RabbitMQ within {waited:.0f} s: {problem}")
            time.sleep(0.02)
        self._watch.up.result()
        if self.monitor.failure is not None:
            raise self.monitor.failure

    def await_newest(self, timeout: float) -> None:
        """Where no aggregator speaks, wait until the stream has said which version is the newest, or has failed to."""
        if self._is_unheard():
            self._sought.wait(timeout)

    # ------------------------------------------------------------------------------------------------ AMQP

    def _keep_looking(self) -> None:
        while not self._stop.wait(LOOK_SECONDS if self.looked.is_set() else LOOK_SECONDS / 10):
            self.monitor.tick()
            self._seek()
            self._look()
            self._share()

    def _look(self) -> None:
        """One look at a time; what it found is taken the next time round."""
        if self._looking is None:
            self._looking = self._watch.look(tuple(purposes(self._topology)))
        elif self._looking.done():
            looking, self._looking = self._looking, None
            try:
                depths = looking.result()
            except (BrokerError, CancelledError) as error:
                self._by_amqp = BrokerFacts(missing=(f"queues by AMQP: {self._watch.problem or error}",))
                return
            plain = {name: None if depth is None else (depth.ready, depth.consumers) for name, depth in depths.items()}
            self._by_amqp = by_amqp(self._topology, plain)
            self.looked.set()

    def _seek(self) -> None:
        """Where no aggregator speaks, the stream says which version is the newest."""
        now = time.monotonic()
        if self._seeking is not None and self._seeking.done():
            seeking, self._seeking = self._seeking, None
            with suppress(BrokerError, CancelledError):
                self._newest = seeking.result()
            self._share()
            self._sought.set()
        elif self._seeking is None and now >= self._seek_at and self._is_unheard():
            self._seek_at = now + NEWEST_EVERY
            self._seeking = self._watch.newest()

    def _is_unheard(self) -> bool:
        """Whether there is a stream, and nobody who says what is in it."""
        return bool(self._by_amqp.is_declared) and self.monitor.state in {"waiting", "silent"}

    # ------------------------------------------------------------------------------------ the management API

    def _keep_asking(self) -> None:
        pause = 0.0
        while not self._stop.wait(pause):
            try:
                facts = self._ask()
            except BrokerError as error:
                pause = PAUSE_SECONDS
                with self._lock:
                    self._refusal = str(error)
            else:
                pause = ASK_SECONDS
                with self._lock:
                    self._by_management, self._answered = facts, time.monotonic()
            self._share()
            self.asked.set()

    def _ask(self) -> BrokerFacts:
        """Raises :class:`BrokerError` if not even the queues can be had."""
        admin, missing = self._admin, []
        queues = admin.queues(admin.vhost, columns=COLUMNS)
        consumers, alarms = None, None
        try:
            consumers = admin.consumers(admin.vhost, columns=("queue.name", "consumer_tag", "active"))
        except BrokerError as error:
            missing.append(f"which aggregators stand by: {error}")
        try:
            alarms = alarms_of(admin.nodes())
        except BrokerError as error:
            missing.append(f"the broker's alarms: {error}")
        facts = by_management(self._topology, queues, consumers, alarms)
        return replace(facts, missing=tuple(missing))

    # ------------------------------------------------------------------------------------------------ both

    def _share(self) -> None:
        """Give the monitor the better of what both have found."""
        with self._lock:
            is_new = self._answered is not None and time.monotonic() - self._answered < OLD_SECONDS
            if is_new:
                facts = self._by_management
            else:
                lack = f"bytes and unacked messages in queues, standbys, the broker's alarms: {self._refusal}"
                facts = replace(self._by_amqp, missing=(*self._by_amqp.missing, lack))
            if self._newest is not None:
                facts = replace(facts, newest=order_of(self._newest)[:2], is_done=self._newest.get("done") == 1)
            self.monitor.observe(facts)


@contextmanager
def watching(config: BrokerConfig, run: str) -> Iterator[Monitor]:
    """A monitor of ``run`` that is fed until the block is left. Returns at once, connected or not.

    Raises :class:`ConfigError` if no run can have this name.
    """
    with Watching(config, run) as watch:
        yield watch.monitor
