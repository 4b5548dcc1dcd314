"""A worker's part of an update's trace: training, encoding, publishing until the broker confirms.

Spans are named and described as OpenTelemetry's semantic conventions for messaging say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from opentelemetry.trace import Span, SpanKind, Status, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from broker.messages import Reason, UpdateId
from broker.topology import UPDATES
from broker.tracing import SENT, TRACEPARENT, nanoseconds
from worker_client.core import events as ev
from worker_client.mailbox import Finished, Item, Published
from worker_client.meter import Meter, Standing

__all__ = ["WorkerTraces"]

_PROPAGATOR = TraceContextTextMapPropagator()


@dataclass(slots=True)
class _Way:
    """An update that is on its way: the whole, and what is being done."""

    whole: Span
    part: Span
    publish_began: int = 0


class WorkerTraces(Meter):
    """Makes spans of what a worker's session tells, on the session's thread.

    Args:
        tracer: makes them.
        run: the run's name.
        worker: this one's.
    """

    def __init__(self, tracer: Tracer, run: str, worker: str) -> None:
        self._tracer = tracer
        self._facts = {"fedmq.run": run, "fedmq.worker": worker}
        self._training: _Way | None = None
        self._trained: _Way | None = None
        self._sending: _Way | None = None
        self._id: UpdateId | None = None

    def watch(self, standing: Callable[[], Standing], model_bytes: int) -> None:
        """See the port."""

    def does(self, effect: ev.Effect) -> None:
        """See the port."""
        match effect:
            case ev.Train(head):
                facts: dict[str, str | int] = {
                    **self._facts,
                    "fedmq.base_version": head.version,
                    "fedmq.base_epoch": head.epoch,
                }
                whole = self._tracer.start_span("update", attributes=facts)
                self._training = _Way(whole, self._part("train", whole))
            case ev.Publish():
                self._sending, self._trained = self._trained, None
                if self._sending is not None:
                    self._sending.publish_began = nanoseconds()
            case ev.PublishAgain() if self._sending is not None:
                self._sending.part.add_event("published again")
            case _:
                pass

    def receives(self, item: Item) -> None:
        """See the port."""
        match item:
            case Finished(result, error) if self._training is not None:
                way, self._training = self._training, None
                if error is not None or result is None:
                    self._fail(way, "abandoned" if error is None else type(error).__name__)
                    return
                for name in ("examples", "steps"):
                    if isinstance(number := getattr(result, name, None), int):
                        way.part.set_attribute(f"fedmq.{name}", number)
                way.part.end()
                self._trained = way
            case Published(error) if self._sending is not None:
                if error is None:
                    way, self._sending, self._id = self._sending, None, None
                    way.part.end()
                    way.whole.end()
                else:
                    self._sending.part.add_event("not published", {"error.type": type(error).__name__})
            case _:
                pass

    def rejected(self, reason: Reason) -> None:
        """See the port."""

    def headers(self, update: UpdateId) -> Mapping[str, str | int]:
        """See the port. Encoding has ended, and publishing begins."""
        way = self._sending
        if way is None:
            return {}
        if self._id != update:
            self._id = update
            way.whole.set_attribute("fedmq.update", str(update))
            encode = self._tracer.start_span(
                "encode", set_span_in_context(way.whole), start_time=way.publish_began or None
            )
            encode.end()
            way.part = self._part(
                f"send {UPDATES}",
                way.whole,
                SpanKind.PRODUCER,
                {
                    "messaging.system": "rabbitmq",
                    "messaging.operation.name": "send",
                    "messaging.operation.type": "send",
                    "messaging.destination.name": UPDATES,
                    "messaging.rabbitmq.destination.routing_key": f"{self._facts['fedmq.run']}.{update.worker}",
                    "messaging.message.id": str(update),
                },
            )
        carrier: dict[str, str] = {}
        _PROPAGATOR.inject(carrier, set_span_in_context(way.part))
        return {TRACEPARENT: carrier[TRACEPARENT], SENT: nanoseconds() // 10**6} if TRACEPARENT in carrier else {}

    def _part(
        self, name: str, whole: Span, kind: SpanKind = SpanKind.INTERNAL, facts: Mapping[str, str] | None = None
    ) -> Span:
        return self._tracer.start_span(name, set_span_in_context(whole), kind=kind, attributes={**(facts or {})})

    def _fail(self, way: _Way, what: str) -> None:
        for span in (way.part, way.whole):
            span.set_attribute("error.type", what)
            span.set_status(Status(StatusCode.ERROR))
            span.end()
