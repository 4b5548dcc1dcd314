"""Traces for OpenTelemetry: whether they are wanted, and where they go. With ``fedmq[otel]``.

The standard environment variables decide, ``OTEL_EXPORTER_OTLP_ENDPOINT`` first of all. Nothing of OpenTelemetry is
imported before they ask for it. The context of an update travels as ``traceparent`` in its AMQP headers, as W3C has it;
nothing but traces depends on it.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # optional
    from opentelemetry.trace import Tracer

__all__ = ["SENT", "TRACEPARENT", "is_wanted", "nanoseconds", "tracer_for"]

log = logging.getLogger("fedmq.tracing")

#: Headers of an update: its context, and when it was sent, in milliseconds since 1970 by the worker's clock.
TRACEPARENT, SENT = "traceparent", "sent"

#: How long a program that leaves waits for what is not exported yet.
LEAVE_SECONDS = 3.0


def is_wanted(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the standard variables ask for traces."""
    known = os.environ if environment is None else environment
    if known.get("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return False
    named = known.get("OTEL_TRACES_EXPORTER", "").strip().lower()
    if named:
        return named != "none"
    return any(known.get(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT") for kind in ("", "TRACES_"))


def nanoseconds(seconds: float | None = None) -> int:
    """Since 1970, as spans have them; of now, if not given."""
    return time.time_ns() if seconds is None else int(seconds * 1e9)


@contextmanager
def tracer_for(role: str, **facts: str) -> Iterator[Tracer | None]:
    """What makes spans of a program in ``role``, of which ``facts`` are known; None if no traces are wanted.

    None, too, with a warning, if they cannot be had: they are worth no failure.
    """
    if not is_wanted():
        yield None
        return
    try:
        provider = _provider(role, facts)
    except (ImportError, ValueError) as error:
        log.warning('no traces: %s; pip install "fedmq[otel]", or unset OTEL_EXPORTER_OTLP_ENDPOINT', error)
        yield None
        return
    try:
        yield provider.get_tracer("fedmq", _release())
    finally:
        _within(LEAVE_SECONDS, provider.shutdown)


def _provider(role: str, facts: Mapping[str, str]) -> Any:
    from opentelemetry.sdk.resources import Resource  # noqa: PLC0415 (optional)
    from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor, ConsoleSpanExporter, SpanExporter  # noqa: PLC0415

    named = os.environ.get("OTEL_TRACES_EXPORTER", "").strip().lower() or "otlp"
    exporter: SpanExporter
    if named == "otlp":
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter  # noqa: PLC0415

        exporter = OTLPSpanExporter()
    elif named == "console":
        exporter = ConsoleSpanExporter(out=sys.stdout)
    else:
        raise ValueError(f"OTEL_TRACES_EXPORTER is {named!r}; otlp (over HTTP), console and none are known")
    own = {f"fedmq.{name}": value for name, value in facts.items()}
    if "OTEL_SERVICE_NAME" not in os.environ:
        own["service.name"] = f"fedmq-{role}"
    provider = TracerProvider(resource=Resource.create({**own, "service.version": _release()}))
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def _release() -> str:
    try:
        return metadata.version("fedmq")
    except metadata.PackageNotFoundError:
        return "unknown"


def _within(seconds: float, work: Callable[[], object]) -> None:
    """Do ``work``, and go on without it after ``seconds``: whoever collects traces may be away."""
    thread = threading.Thread(target=work, name="traces", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        log.warning("some traces were not exported in time")
