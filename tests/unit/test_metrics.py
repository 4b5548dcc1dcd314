"""What is exported to Prometheus: from a whole run, in Prometheus' own format, under Prometheus' conventions."""

from __future__ import annotations

import re
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry, Metric, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.snapshot import Entry
from aggregator.metrics import SERIES as AGGREGATOR
from aggregator.metrics import AggregatorMetrics
from broker.amqp.transport import AmqpWorkerTransport
from broker.certificates import Authority
from broker.errors import ConfigError, ConnectionLost
from broker.messages import ParametersHead, Plan, Reason, Role, UpdateHead, UpdateId
from broker.metrics import BROKER_SERIES, BUILD, OTHER, Figures, Histogram, Names, Series, half_decades, serve
from broker.settings import MetricsConfig, load
from broker.tls import client_context
from broker.topology import Topology
from broker.transport import Delivery, LinkState, Source, Token
from tests.support.builders import update_of, vector
from tests.support.commands import ABSENT
from tests.support.tasks import Line
from tests.support.together import federate
from worker_client.cli import metered
from worker_client.config import WorkerConfig
from worker_client.core import events as ev
from worker_client.mailbox import Published
from worker_client.meter import Meter, Standing
from worker_client.metrics import SERIES as WORKER
from worker_client.metrics import WorkerMetrics

ALL = (BUILD, *BROKER_SERIES, *AGGREGATOR, *WORKER)
UP = LinkState(connected=True, blocked=False, reconnects=2, sent_bytes=10, received_bytes=20, dead_letters=3)


def text_of(collector: Collector) -> str:
    registry = CollectorRegistry()
    registry.register(collector)
    return generate_latest(registry).decode()


def families(collector: Collector) -> dict[str, Metric]:
    return {family.name: family for family in text_string_to_metric_families(text_of(collector))}


def value_of(collector: Collector, name: str, **labels: str) -> float:
    """Of the one sample of this name with these labels, and any others."""
    found = [
        sample.value
        for family in families(collector).values()
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def folded(worker: str, seq: int = 0, **more: float) -> do.Folded:
    values = {"base_version": 0, "staleness": 2, "weight": 1.0, "examples": 4, "seconds": 0.5, **more}
    return do.Folded(Entry(UpdateId(worker, "i", seq), **values), 1, 4, 0.5)  # type: ignore[arg-type]


@pytest.fixture
def metrics(tmp_path: Path) -> AggregatorMetrics:
    return AggregatorMetrics("r", tmp_path, workers=2, broker=lambda: UP)


# ------------------------------------------------------------------------------------------------------ conventions


@pytest.mark.parametrize("series", ALL, ids=lambda series: series.name)
def test_names_and_units_follow_prometheus_conventions(series: Series) -> None:
    """https://prometheus.io/docs/practices/naming and what ``promtool check metrics`` looks at."""
    assert re.fullmatch(r"fedmq_[a-z]+(_[a-z]+)*", series.name)
    assert re.fullmatch(r"[A-Z1].*[.]", series.help)
    assert (series.kind == "counter") == series.name.endswith("_total")
    # Suffixes that the format itself appends, names of types, units that are not base units, abbreviations.
    taken = {"count", "sum", "bucket", "counter", "gauge", "histogram", "info"}
    not_base = {
        "ms",
        "milliseconds",
        "minutes",
        "hours",
        "days",
        "kb",
        "mb",
        "megabytes",
        "kilobytes",
        "bits",
        "percent",
    }
    short = {"s", "sec", "secs", "b"}
    words = set(series.name.removesuffix("_total").split("_")[1:])
    assert not words & (taken - {"info"} | not_base | short)
    assert series.name.split("_")[-1] != "info" or series is BUILD
    assert all(re.fullmatch(r"[a-z]+", label) and label not in {"le", "quantile"} for label in series.labels)
    assert (series.kind == "histogram") == bool(series.bounds)
    assert list(series.bounds) == sorted(set(series.bounds))
    # A unit stands at the end of the name, before _total.
    for unit in ("seconds", "bytes"):
        assert unit not in words or series.name.removesuffix("_total").endswith(unit)


def test_no_two_series_share_a_name() -> None:
    names = [series.name.removesuffix("_total") for series in ALL]
    assert len(set(names)) == len(names)


def test_the_bounds_of_buckets_are_round_numbers() -> None:
    assert half_decades(-2, 1) == (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def test_a_histogram_counts_each_value_up_to_its_bound() -> None:
    histogram = Histogram((1.0, 10.0))
    for value in (0.5, 1.0, 3.0, 100.0):
        histogram.observe(value)

    assert histogram.buckets() == [("1.0", 2), ("10.0", 3), ("+Inf", 4)]
    assert (histogram.count, histogram.total) == (4, 104.5)


# ------------------------------------------------------------------------------------------------------------ a run


def test_a_whole_run_is_in_the_figures(tmp_path: Path) -> None:
    aggregator = AggregatorMetrics("together", tmp_path, workers=10)
    workers = {name: WorkerMetrics("together", name, Role.TRAINER) for name in ("w1", "w2")}

    ended = federate(
        tmp_path,
        Line(),
        {"buffer_size": 2, "stop_after_rounds": 3, "evaluate_every": 1},
        {"w1": {}, "w2": {}},
        meters={"aggregator": aggregator, **workers},
        validation_fraction=0.25,
    )

    exported = families(aggregator)
    assert set(exported) >= {series.name.removesuffix("_total") for series in AGGREGATOR}
    run = {"run": "together"}
    assert all(run.items() <= s.labels.items() for family in exported.values() for s in family.samples)
    applied = ended.outcome.applied
    assert value_of(aggregator, "fedmq_aggregator_updates_folded_total") == applied == 6
    assert value_of(aggregator, "fedmq_aggregator_versions_total") == 3
    assert value_of(aggregator, "fedmq_aggregator_version") == 3
    assert value_of(aggregator, "fedmq_aggregator_epoch") == ended.outcome.epoch
    assert value_of(aggregator, "fedmq_aggregator_done") == 1
    assert value_of(aggregator, "fedmq_aggregator_buffer_goal_updates") == 2
    rejected = sum(ended.outcome.rejected.values())
    assert value_of(aggregator, "fedmq_aggregator_updates_received_total") == applied + rejected
    for stage, least in {"decode": applied, "fold": applied, "step": 3, "checkpoint": 3, "broadcast": 3}.items():
        assert value_of(aggregator, f"fedmq_aggregator_{stage}_seconds_count") >= least
        assert value_of(aggregator, f"fedmq_aggregator_{stage}_seconds_sum") > 0
    assert value_of(aggregator, "fedmq_aggregator_staleness_versions_count") == applied
    assert value_of(aggregator, "fedmq_aggregator_evaluation", split="train", metric="loss") > 0
    assert value_of(aggregator, "fedmq_aggregator_evaluation", split="workers", metric="loss") > 0
    assert value_of(aggregator, "fedmq_aggregator_update_bytes_total") > 0
    assert value_of(aggregator, "fedmq_aggregator_update_uncompressed_bytes_total") == 20 * (applied + rejected)
    by_worker = [value_of(aggregator, "fedmq_aggregator_worker_updates_folded_total", worker=name) for name in workers]
    assert sum(by_worker) == applied
    for name, metrics in workers.items():
        assert set(families(metrics)) >= {series.name.removesuffix("_total") for series in WORKER}
        confirmed = ended.summaries[name].confirmed
        assert value_of(metrics, "fedmq_worker_updates_confirmed_total", worker=name, role="trainer") == confirmed
        assert value_of(metrics, "fedmq_worker_training_seconds_count") >= confirmed
        assert value_of(metrics, "fedmq_worker_upload_seconds_count") >= confirmed
        assert value_of(metrics, "fedmq_worker_evaluation_seconds_count") >= 1
        assert value_of(metrics, "fedmq_worker_download_uncompressed_bytes_total") >= 20
        assert value_of(metrics, "fedmq_worker_metric", metric="loss") > 0
        assert value_of(metrics, "fedmq_worker_state", state="gone") == 1


def test_rejected_repeated_and_silent_are_told_apart(metrics: AggregatorMetrics) -> None:
    for fact in (
        do.Came("w1", Role.TRAINER),
        do.Came("w2", Role.TRAINER),
        do.Rejected("w1", Reason.NOT_FINITE, "…"),
        do.Rejected("w1", Reason.NOT_FINITE, "…"),
        do.Repeated(UpdateId("w1", "i", 0)),
        do.Went("w1", Role.TRAINER, ""),
        do.Went("w2", Role.TRAINER, "the run is over"),
    ):
        metrics.records(fact, 1)

    assert value_of(metrics, "fedmq_aggregator_updates_rejected_total", reason="not-finite") == 2
    assert value_of(metrics, "fedmq_aggregator_worker_updates_rejected_total", worker="w1", reason="not-finite") == 2
    assert value_of(metrics, "fedmq_aggregator_updates_duplicate_total") == 1
    assert value_of(metrics, "fedmq_aggregator_worker_silent", worker="w1") == 1
    assert value_of(metrics, "fedmq_aggregator_worker_silent", worker="w2") == 0
    assert value_of(metrics, "fedmq_aggregator_workers", role="trainer") == 0


def test_figures_of_an_older_version_do_not_take_the_place_of_a_newer_ones(metrics: AggregatorMetrics) -> None:
    for version, accuracy in ((3, 0.5), (5, 0.7), (4, 0.6)):
        metrics.records(do.EvaluationRecord("e", version, {"accuracy": accuracy}), 5)

    assert value_of(metrics, "fedmq_aggregator_evaluation", split="test", metric="accuracy") == 0.7


def test_an_update_in_chunks_is_received_once_and_weighs_what_its_chunks_do(metrics: AggregatorMetrics) -> None:
    token, update = Token(1, 1), update_of({"w": vector(1, 2, 3)})
    manifest = Delivery(source=Source.UPDATE, body=b"m" * 10, token=token)
    head = UpdateHead(**{field.name: getattr(update, field.name) for field in fields(UpdateHead)})
    metrics.received(manifest, on.Announced(token, head, update.model))
    metrics.received(replace(manifest, chunks=(b"c" * 70, b"c" * 30)), on.Arrived(token, update, 100))
    metrics.received(replace(manifest, lost="gone"), on.Unreadable(token, Reason.INCOMPLETE, "gone"))

    assert value_of(metrics, "fedmq_aggregator_updates_received_total") == 1
    assert value_of(metrics, "fedmq_aggregator_update_bytes_total") == 110
    assert value_of(metrics, "fedmq_aggregator_update_uncompressed_bytes_total") == 12


def test_a_workers_way_with_a_version_and_an_update_in_chunks() -> None:
    metrics = WorkerMetrics("r", "w1", Role.TRAINER)
    metrics.watch(lambda: Standing("training", 7, 3, 1, refused=3), 1000)
    manifest = Delivery(source=Source.PARAMETERS, body=b"m" * 10, headers={"chunks": 2})
    metrics.receives(manifest)
    metrics.does(ev.Download(ParametersHead(run="r", epoch=1, version=7, plan=Plan(), digest="0" * 32)))
    metrics.receives(replace(manifest, chunks=(b"c" * 70, b"c" * 30)))
    metrics.does(ev.Publish())
    metrics.receives(Published(ConnectionLost("cut")))
    metrics.does(ev.PublishAgain())
    metrics.receives(Published(None))
    metrics.rejected(Reason.TOO_STALE)

    assert value_of(metrics, "fedmq_worker_download_bytes_total") == 110
    assert value_of(metrics, "fedmq_worker_download_uncompressed_bytes_total") == 1000
    assert value_of(metrics, "fedmq_worker_download_seconds_count") == 1
    assert value_of(metrics, "fedmq_worker_upload_seconds_count") == 1
    assert value_of(metrics, "fedmq_worker_upload_uncompressed_bytes_total") == 1000
    assert value_of(metrics, "fedmq_worker_publish_failures_total") == 1
    assert value_of(metrics, "fedmq_worker_updates_rejected_total", reason="too-stale") == 1
    assert value_of(metrics, "fedmq_worker_state", state="training") == 1
    assert value_of(metrics, "fedmq_worker_outstanding_updates") == 1
    assert value_of(metrics, "fedmq_worker_messages_refused_total") == 3


def test_workers_beyond_the_first_share_one_series(metrics: AggregatorMetrics) -> None:
    for index in range(500):
        metrics.records(folded(f"w{index}", loss=float(index)), 1)

    name = "fedmq_aggregator_worker_updates_folded_total"
    assert value_of(metrics, name, worker="w1") == 1
    assert value_of(metrics, name, worker=OTHER) == 498
    assert value_of(metrics, "fedmq_aggregator_worker_training_seconds_total", worker=OTHER) == 249
    # Of many workers there is no one loss.
    losses = families(metrics)["fedmq_aggregator_worker_loss"].samples
    assert {sample.labels["worker"] for sample in losses} == {"w0", "w1"}


def test_none_may_have_a_series_of_its_own() -> None:
    assert Names(0)("w1") == OTHER


def test_what_is_no_name_has_none(metrics: AggregatorMetrics) -> None:
    for worker in ("", "x" * 10_000, 'w"} 1\nfedmq_aggregator_leads 7', "w1"):
        metrics.records(do.Rejected(worker, Reason.MALFORMED, "…"), 1)

    name = "fedmq_aggregator_worker_updates_rejected_total"
    assert value_of(metrics, name, worker=OTHER) == 3
    assert value_of(metrics, name, worker="w1") == 1


def test_how_it_stands_with_the_broker(metrics: AggregatorMetrics) -> None:
    assert value_of(metrics, "fedmq_broker_connected") == 1
    assert value_of(metrics, "fedmq_broker_blocked") == 0
    assert value_of(metrics, "fedmq_broker_reconnects_total") == 2
    assert value_of(metrics, "fedmq_broker_sent_bytes_total") == 10
    assert value_of(metrics, "fedmq_broker_received_bytes_total") == 20
    assert value_of(metrics, "fedmq_aggregator_dead_letters_total") == 3


def test_odd_characters_come_through() -> None:
    odd = 'a"b\\c\nd{e="f"}'
    value: Mapping[tuple[str, ...], float] = {(odd,): 1.0}
    figures = Figures({"run": odd}, {Series("fedmq_x", "gauge", "X.", ("metric",)): lambda: value})

    (sample,) = families(figures)["fedmq_x"].samples
    assert sample.labels == {"run": odd, "metric": odd}


# ---------------------------------------------------------------------------------------------------------- serving


def get(port: int | None) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20) as answer:
        return str(answer.read().decode())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_the_figures_are_served_with_those_of_the_process(metrics: AggregatorMetrics) -> None:
    config = MetricsConfig(port=free_port())

    with serve(config, metrics) as port:
        page = get(port)

    assert 'fedmq_aggregator_leads{run="r"} 0.0' in page
    assert "process_resident_memory_bytes" in page
    with socket.socket() as probe:  # it does not outlast the block
        assert probe.connect_ex(("127.0.0.1", config.port)) != 0


def test_they_are_served_over_tls_and_whoever_says_nothing_keeps_nobody_waiting(
    metrics: AggregatorMetrics, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    authority = Authority.new(tmp_path)
    authority.server(["127.0.0.1"])
    authority.client("prometheus")
    ca = tmp_path / "ca.pem"
    mine = client_context(
        ca_file=ca, certificate_file=tmp_path / "prometheus.pem", key_file=tmp_path / "prometheus.key"
    )
    files = {"certificate_file": tmp_path / "broker.pem", "key_file": tmp_path / "broker.key", "client_ca_file": ca}

    with serve(MetricsConfig.model_validate({"port": free_port(), **files}), metrics) as port:
        url = f"https://127.0.0.1:{port}/metrics"
        with (
            socket.create_connection(("127.0.0.1", port or 0)),  # no handshake comes
            urllib.request.urlopen(url, timeout=20, context=mine) as answer,
        ):
            assert b"fedmq_aggregator_leads" in answer.read()
        with pytest.raises(OSError, match=r"(?i)required|reset|closed|eof|broken pipe"):
            urllib.request.urlopen(url, timeout=20, context=client_context(ca_file=ca))
        with pytest.raises(OSError, match=r"(?i)reset|closed|eof|broken pipe"):
            get(port)
    said = capfd.readouterr().err
    assert "SSL" not in said
    assert "processing of request" not in said


def test_a_certificate_that_cannot_be_used_is_said_at_once(metrics: AggregatorMetrics, tmp_path: Path) -> None:
    config = MetricsConfig(port=free_port(), certificate_file=tmp_path / "no.pem", key_file=tmp_path / "no.key")
    with pytest.raises(ConfigError, match=r"metrics\.certificate_file.*No such file"), serve(config, metrics):
        pass


def test_by_the_newer_protocol_as_well(metrics: AggregatorMetrics, caplog: pytest.LogCaptureFixture) -> None:
    if not socket.has_ipv6:
        pytest.skip("no IPv6 here")
    caplog.set_level("INFO", "fedmq.metrics")
    with serve(MetricsConfig(port=free_port(), address="::1"), metrics) as port:
        if port is None:
            pytest.skip("no IPv6 here")
        with urllib.request.urlopen(f"http://[::1]:{port}/metrics", timeout=20) as answer:
            assert b"fedmq_aggregator_leads" in answer.read()

    assert f"http://[::1]:{port}/metrics" in caplog.text


@pytest.mark.parametrize("is_wanted", [True, False])
def test_a_workers_command_serves_what_is_set(is_wanted: bool) -> None:
    port = free_port()
    settings = load(
        {"worker": WorkerConfig, "metrics": MetricsConfig},
        flags=[("run", "r"), ("metrics.port", port if is_wanted else 0), ("broker.url", ABSENT)],
        environment={},
    )
    transport = AmqpWorkerTransport(settings.broker, Topology("r"), worker="w1")

    with metered(settings, "w1", Role.TRAINER, transport) as meter:
        if is_wanted:
            assert 'fedmq_broker_connected{role="trainer",run="r",worker="w1"} 0.0' in get(port)
        else:
            assert type(meter) is Meter
            with pytest.raises(OSError, match="refused"):
                get(port)


def test_a_port_that_is_taken_is_one_warning_that_says_what_to_do(
    metrics: AggregatorMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]

        with serve(MetricsConfig(port=taken), metrics) as port:
            assert port is None

    (record,) = caplog.records
    assert str(taken) in record.getMessage()
    assert "set metrics.port" in record.getMessage()


@pytest.mark.parametrize("address", ["203.0.113.7", "no.such.host.invalid"])
def test_an_address_that_is_not_this_machines_neither(
    address: str, metrics: AggregatorMetrics, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(MetricsConfig(port=free_port(), address=address), metrics) as port:
        assert port is None

    assert len(caplog.records) == 1
