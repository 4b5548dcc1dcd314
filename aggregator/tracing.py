"""The aggregator's part of an update's trace: the wait in the queue, decoding, folding, until a version has it.

An update's trace is begun by its worker, whose context stands in the message's headers. A version has a trace of its
own, and where the two meet, they are linked: the version with its updates, each update's last span with the version. As
OpenTelemetry's semantic conventions for messaging have it of batches.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from types import TracebackType

from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    Tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.snapshot import Entry, VersionRecord
from aggregator.meter import Meter
from aggregator.reign import Reign
from broker.messages import UpdateId
from broker.topology import Topology
from broker.tracing import SENT, TRACEPARENT, nanoseconds
from broker.transport import Delivery

__all__ = ["AggregatorTraces"]

_PROPAGATOR = TraceContextTextMapPropagator()

#: Updates that are known to be folded and in no version yet, the newest; and links of a version.
MOST_OPEN, MOST_LINKS = 10_000, 1_000


class _Moment:
    """When the reading of an update began, in nanoseconds since 1970."""

    def __init__(self) -> None:
        self.began = 0

    def __enter__(self) -> None:
        self.began = nanoseconds()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


@dataclass(slots=True)
class _Taken:
    """An update that was read and is not folded yet."""

    span: Span
    since: int


class AggregatorTraces(Meter):
    """Makes spans of what the service tells, on the service's thread.

    Args:
        tracer: makes them.
        run: the run's name.
    """

    def __init__(self, tracer: Tracer, run: str) -> None:
        self._tracer = tracer
        self._queue = Topology(run).updates
        self._run = run
        self._moment = _Moment()
        self.decode = self._moment
        self._taken: dict[UpdateId, _Taken] = {}
        self._folded: dict[UpdateId, tuple[SpanContext, int]] = {}
        self._announced: dict[str, int] = {}
        self._version: Span | None = None

    def watch(self, leads: Callable[[], bool]) -> None:
        """See the port."""
        del leads
        for taken in self._taken.values():
            taken.span.end()
        self._taken.clear()
        self._folded.clear()
        self._announced.clear()

    def reigns(self, reign: Reign) -> None:
        """See the port."""

    def received(self, delivery: Delivery, event: on.Happening) -> None:
        """See the port. An update in chunks is announced first, and here when they are fetched."""
        name = str(delivery.headers.get("message_id", ""))
        if isinstance(event, on.Announced):
            if len(self._announced) < MOST_OPEN:
                self._announced[name] = self._moment.began
            return
        announced = self._announced.pop(name, None)
        if not isinstance(event, on.Arrived):
            return
        began, now, update = self._moment.began, nanoseconds(), event.update
        parent = _PROPAGATOR.extract({TRACEPARENT: str(delivery.headers.get(TRACEPARENT, ""))})
        first = began if announced is None else announced
        span = self._tracer.start_span(
            f"process {self._queue}",
            parent,
            kind=SpanKind.CONSUMER,
            start_time=first,
            attributes={
                "messaging.system": "rabbitmq",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": self._queue,
                "messaging.message.id": str(update.id),
                "messaging.message.body.size": event.nbytes,
                "fedmq.run": self._run,
                "fedmq.worker": update.id.worker,
                "fedmq.base_version": update.base_version,
                "fedmq.redelivered": delivery.redelivered,
            },
        )
        sent = delivery.headers.get(SENT)
        # By the worker's clock: if that is ahead of ours, it tells nothing.
        if isinstance(sent, int) and 0 < sent * 10**6 <= first:
            self._tracer.start_span("queue", parent, start_time=sent * 10**6).end(first)
        if announced is not None:
            self._part("fetch", span, announced, began)
        self._part("decode", span, began, now)
        if (former := self._taken.pop(update.id, None)) is not None:
            former.span.end()
        self._taken[update.id] = _Taken(span, now)

    def records(self, fact: do.Fact, version: int) -> None:
        """See the port."""
        match fact:
            case do.Folded(entry):
                self._fold(entry, version)
            case do.Rejected(_, reason, _, update) if update is not None:
                self._end(update, reason.value)
            case do.Repeated(update):
                self._end(update, None)
            case do.VersionMade(record):
                self._made(record)
            case _:
                pass

    def broadcasting(self, sent: Future[None], nbytes: int) -> None:
        """See the port."""
        if self._version is None:
            return
        span = self._tracer.start_span(
            f"send {Topology(self._run).parameters}",
            set_span_in_context(self._version),
            kind=SpanKind.PRODUCER,
            attributes={
                "messaging.system": "rabbitmq",
                "messaging.operation.name": "send",
                "messaging.operation.type": "send",
                "messaging.destination.name": Topology(self._run).parameters,
                "fedmq.bytes": nbytes,
            },
        )
        sent.add_done_callback(lambda _: span.end())

    def _fold(self, entry: Entry, version: int) -> None:
        taken = self._taken.pop(entry.id, None)
        if taken is None:
            return
        now = nanoseconds()
        self._part("fold", taken.span, taken.since, now)
        taken.span.set_attribute("fedmq.staleness", entry.staleness)
        taken.span.set_attribute("fedmq.weight", entry.weight)
        taken.span.set_attribute("fedmq.version_then", version)
        taken.span.end()
        self._folded[entry.id] = taken.span.get_span_context(), now
        if len(self._folded) > MOST_OPEN:
            del self._folded[next(iter(self._folded))]

    def _end(self, update: UpdateId, reason: str | None) -> None:
        taken = self._taken.pop(update, None)
        if taken is None:
            return
        if reason is None:
            taken.span.set_attribute("fedmq.repeated", True)
        else:
            taken.span.set_attribute("error.type", reason)
            taken.span.set_status(Status(StatusCode.ERROR))
        taken.span.end()

    def _made(self, record: VersionRecord) -> None:
        ids = (entry.id for entry in (*record.updates, *record.dropped))
        met = [found for update in ids if (found := self._folded.pop(update, None)) is not None]
        now = nanoseconds()
        began = min(now, nanoseconds(record.time - record.seconds)) if record.time > 0 else now
        span = self._version = self._tracer.start_span(
            "version",
            links=[Link(context) for context, _ in met[:MOST_LINKS]],
            start_time=began,
            attributes={
                "fedmq.run": self._run,
                "fedmq.version": record.version,
                "fedmq.epoch": record.epoch,
                "fedmq.updates": len(record.updates),
            },
        )
        for context, since in met:
            self._tracer.start_span(
                "commit",
                set_span_in_context(NonRecordingSpan(context)),
                start_time=since,
                links=[Link(span.get_span_context())],
                attributes={"fedmq.version": record.version},
            ).end(now)
        span.end(max(now, began))

    def _part(self, name: str, whole: Span, began: int, ended: int) -> None:
        self._tracer.start_span(name, set_span_in_context(whole), start_time=began).end(ended)
