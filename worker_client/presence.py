"""What a worker says of itself: hello, heartbeats, evaluations, goodbye."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from broker.errors import FedmqError
from broker.messages import EventKind, ParametersHead
from broker.transport import WorkerTransport
from worker_client.outbox import Outbox
from worker_client.publishing import error_of
from worker_client.sending import Sender
from worker_client.training import Evaluation

__all__ = ["Presence"]

log = logging.getLogger("fedmq.worker")

#: Seconds to wait for the goodbye to be out.
GOODBYE = 1.0


class Presence:
    """How the aggregator, and whoever watches the run, know of one worker.

    Args:
        transport: takes what is said.
        sender: writes it.
        outbox: knows this life's updates, and what former lives have not told.
        folder: whose file ``alive`` is touched with each heartbeat; None for none.
    """

    def __init__(self, transport: WorkerTransport, sender: Sender, outbox: Outbox, folder: Path | None) -> None:
        self._transport = transport
        self._sender = sender
        self._outbox = outbox
        self._folder = folder
        self._hello: Future[None] | None = None
        self._farewells: dict[str, Future[None]] = {}

    def greet(self, version: int) -> None:
        """Say hello, and before it what a former life of this worker may have had no time to say.

        ``version`` is the newest that is here; -1 if none.
        """
        for incarnation, confirmed in self._outbox.former.items():
            goodbye = self._sender.goodbye(confirmed, "it was started anew", incarnation=incarnation)
            self._farewells[incarnation] = self._transport.control(goodbye)
        self._hello = self._transport.control(self._sender.hello(version))

    def greet_again(self, version: int) -> None:
        """A hello fails if the run's aggregator has never been there yet; it may be there now."""
        told = [name for name, future in self._farewells.items() if future.done() and error_of(future) is None]
        self._outbox.told(told)
        if self._hello is not None and self._hello.done() and error_of(self._hello) is not None:
            self.greet(version)

    def beat(self, state: str, version: int, *, seconds: float, loss: float | None) -> None:
        """One heartbeat: in which state the worker is, which version it knows, and of its last training the figures."""
        if self._folder is not None:
            # For health checks from outside: only a worker that is connected and not stuck comes by here.
            with contextlib.suppress(OSError):
                (self._folder / "alive").touch()
        self._event(
            EventKind.HEARTBEAT,
            {
                "state": state,
                "version": version,
                "confirmed": self._outbox.confirmed,
                "seconds": seconds,
                "loss": loss if loss is not None and math.isfinite(loss) else None,
            },
        )

    def tell(self, kind: EventKind, evaluation: Evaluation, of: ParametersHead) -> None:
        """What the evaluation of a version has given, as an event of this ``kind``."""
        facts = {"version": of.version, "epoch": of.epoch, "examples": evaluation.examples}
        self._event(kind, {**evaluation.metrics, **facts, "seconds": evaluation.seconds})

    def say_goodbye(self, reason: str, *, wait: bool) -> None:
        """Say goodbye; with ``wait``, give it a second to get out."""
        try:
            goodbye = self._transport.control(self._sender.goodbye(self._outbox.confirmed, reason))
            if wait:
                goodbye.result(timeout=GOODBYE)
        except (FedmqError, TimeoutError) as error:
            log.debug("the goodbye did not get out: %s", error)

    def _event(self, kind: EventKind, data: Mapping[str, Any]) -> None:
        self._transport.event(kind.value, self._sender.event(kind, data))
