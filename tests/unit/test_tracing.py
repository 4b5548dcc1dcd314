"""One trace for an update's way, from its training to the version that it is in."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode, Tracer

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.snapshot import VersionRecord
from aggregator.meter import Meter, Meters
from aggregator.tracing import AggregatorTraces
from broker.messages import Reason, UpdateId
from broker.settings import CHUNK_BYTES
from broker.tracing import SENT, TRACEPARENT, is_wanted, nanoseconds, tracer_for
from broker.transport import Delivery, Source, Token
from tests.support.builders import update_of, vector
from tests.support.tasks import CELLS, Counting, Line
from tests.support.together import RUN, federate
from worker_client import meter as worker_meter
from worker_client.tracing import WorkerTraces

#: Makes a model that is larger than a chunk.
WIDE = CHUNK_BYTES // 4 // CELLS + 1000


class Collected:
    """Where spans go."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        provider = TracerProvider()
        provider.add_span_processor(SimpleSpanProcessor(self._exporter))
        self.tracer: Tracer = provider.get_tracer("test")

    @property
    def all(self) -> list[ReadableSpan]:
        return list(self._exporter.get_finished_spans())

    def named(self, name: str) -> list[ReadableSpan]:
        return [span for span in self.all if span.name == name]


@pytest.fixture
def spans() -> Collected:
    return Collected()


def facts(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def identity(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def parent(span: ReadableSpan) -> int | None:
    return None if span.parent is None else span.parent.span_id


def links(span: ReadableSpan) -> set[tuple[int, int]]:
    return {(link.context.trace_id, link.context.span_id) for link in span.links}


@pytest.mark.parametrize("chunked", [False, True])
def test_an_update_is_followed_from_its_training_to_its_version(
    tmp_path: Path, spans: Collected, chunked: bool
) -> None:
    task = Counting(width=WIDE) if chunked else Line()
    workers: Any = {name: WorkerTraces(spans.tracer, RUN, name) for name in ("w0", "w1")}
    meters = {"aggregator": Meters(Meter(), AggregatorTraces(spans.tracer, RUN)), **workers}
    settings = {"buffer_size": 2, "stop_after_rounds": 3, "updates_per_version": 1, "mode": "delta"}

    ended = federate(tmp_path, task, settings, {"w0": {"shard": "0/2"}, "w1": {"shard": "1/2"}}, meters=meters)

    versions = spans.named("version")
    assert [facts(span)["fedmq.version"] for span in versions] == [1, 2, 3]
    for line, version in zip(ended.lines("version"), versions, strict=True):
        ids = {f"{u['worker']}/{u['incarnation']}/{u['seq']}" for u in line["updates"]}
        assert len(links(version)) == len(ids) == 2
        found = set()
        for trace, context in links(version):
            mine = {span.name: span for span in spans.all if identity(span)[0] == trace}
            process = mine[f"process fedmq.{RUN}.updates"]
            assert identity(process) == (trace, context)
            names = {"update", "train", "encode", "send fedmq.updates", "decode", "fold", "commit"}
            assert ("fetch" in mine) is chunked
            assert names <= set(mine)
            # The worker's own are within its whole; what the aggregator does, within its processing of the message.
            whole = mine["update"]
            assert parent(whole) is None
            for name in ("train", "encode", "send fedmq.updates"):
                assert parent(mine[name]) == identity(whole)[1]
            assert parent(process) == identity(mine["send fedmq.updates"])[1]
            for name in ("decode", "fold", "commit"):
                assert parent(mine[name]) == context
            assert (process.kind, mine["send fedmq.updates"].kind) == (SpanKind.CONSUMER, SpanKind.PRODUCER)
            assert links(mine["commit"]) == {identity(version)}
            assert facts(mine["commit"])["fedmq.version"] == line["version"]
            assert facts(process)["messaging.message.id"] == facts(whole)["fedmq.update"]
            found.add(facts(process)["messaging.message.id"])
            times = [mine[name].start_time or 0 for name in ("train", "encode", "send fedmq.updates", "decode", "fold")]
            assert times == sorted(times)
        assert found == ids


def test_without_traces_an_update_has_the_headers_that_it_always_had() -> None:
    assert worker_meter.Meter().headers(UpdateId("w", "i", 0)) == {}
    counting = worker_meter.Meters(worker_meter.Meter(), worker_meter.Meter())
    assert counting.headers(UpdateId("w", "i", 0)) == {}


# ------------------------------------------------------------------------------- the aggregator, told by hand


class Told:
    """The aggregator's part, with deliveries made by hand."""

    def __init__(self, spans: Collected) -> None:
        self.spans = spans
        self.traces = AggregatorTraces(spans.tracer, RUN)
        self._tag = 0

    def deliver(self, seq: int, **headers: str | int) -> UpdateId:
        self._tag += 1
        update = update_of({"w": vector(1.0)}, worker="w0", seq=seq, run=RUN)
        token = Token(1, self._tag)
        delivery = Delivery(source=Source.UPDATE, body=b"x", headers=headers, token=token)
        with self.traces.decode:
            event = on.Arrived(token, update, 1)
        self.traces.received(delivery, event)
        return update.id


@pytest.fixture
def told(spans: Collected) -> Told:
    return Told(spans)


@pytest.mark.parametrize("header", ["", "nonsense", "00-0-0-01", "00-" + "f" * 999])
def test_what_no_context_can_be_read_from_begins_a_trace(told: Told, spans: Collected, header: str) -> None:
    update = told.deliver(0, **{TRACEPARENT: header, SENT: "no"})
    told.traces.records(do.Rejected("w0", Reason.NOT_FINITE, "", update), 3)

    (process,) = spans.named(f"process fedmq.{RUN}.updates")
    assert process.parent is None
    assert facts(process)["error.type"] == "not-finite"
    assert process.status.status_code is StatusCode.ERROR
    assert not spans.named("queue")


def test_the_wait_in_the_queue_is_known_where_the_clocks_agree(told: Told, spans: Collected) -> None:
    context = f"00-{'a' * 32}-{'b' * 16}-01"
    now = nanoseconds() // 10**6
    told.deliver(0, traceparent=context, sent=now - 5_000)
    told.deliver(1, traceparent=context, sent=now + 50_000)

    (queue,) = spans.named("queue")
    assert parent(queue) == int("b" * 16, 16)
    assert queue.start_time is not None
    assert queue.end_time is not None
    assert 4e9 < queue.end_time - queue.start_time < 60e9


def test_a_repeated_update_and_one_that_is_delivered_again_end(told: Told, spans: Collected) -> None:
    update = told.deliver(0)
    told.deliver(0)
    told.traces.records(do.Repeated(update), 3)
    told.traces.records(do.Repeated(update), 3)

    assert [facts(span).get("fedmq.repeated") for span in spans.named(f"process fedmq.{RUN}.updates")] == [None, True]


def test_a_broadcast_belongs_to_its_version(told: Told, spans: Collected) -> None:
    sent: Future[None] = Future()
    told.traces.broadcasting(sent, 10)
    assert not spans.all
    told.traces.records(do.VersionMade(VersionRecord(4, 1, 10.0, 2.0, (), None, "a", "b")), 4)
    told.traces.broadcasting(sent, 10)
    sent.set_result(None)

    (version,), (send,) = spans.named("version"), spans.named(f"send fedmq.{RUN}.parameters")
    assert parent(send) == identity(version)[1]


# -------------------------------------------------------------------------------------------------- the settings


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://collector:4318"}, True),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_TRACES_EXPORTER": "none"}, False),
        ({"OTEL_EXPORTER_OTLP_ENDPOINT": "http://c", "OTEL_SDK_DISABLED": "true"}, False),
        ({"OTEL_TRACES_EXPORTER": "console"}, True),
    ],
)
def test_the_standard_variables_decide(environment: dict[str, str], wanted: bool) -> None:
    assert is_wanted(environment) is wanted


def test_what_cannot_be_had_is_a_warning(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "zipkin")
    with tracer_for("worker", run="r") as tracer:
        assert tracer is None
    assert "OTEL_TRACES_EXPORTER is 'zipkin'" in caplog.text


def test_spans_say_which_run_they_are_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "console")
    monkeypatch.delenv("OTEL_SERVICE_NAME", raising=False)
    with tracer_for("worker", run="digits", worker="w1") as tracer:
        assert tracer is not None
        tracer.start_span("x").end()

    shown = capsys.readouterr().out
    for word in ('"service.name": "fedmq-worker"', '"fedmq.run": "digits"', '"fedmq.worker": "w1"'):
        assert word in shown
