"""Metrics of a real run over RabbitMQ, and RabbitMQ's own: what dashboard and alerts ask for is there."""

from __future__ import annotations

import socket
import urllib.request
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from aggregator.checkpoint import CheckpointStore
from aggregator.metrics import AggregatorMetrics
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.messages import Role
from broker.metrics import serve
from broker.settings import MetricsConfig
from broker.topology import Topology
from broker.transport import LinkState, Outgoing, Source
from fedmq.reference import SERIES
from tests.support.builders import spec_of, vector
from tests.support.commands import running
from tests.support.ends import Ends, confirmed
from tests.support.monitoring import page_queries, queries
from tests.support.node import GivenNode, config_of, fresh_topology
from tests.support.tasks import Line
from tests.support.together import RUN, federate
from tests.support.waiting import wait_for
from worker_client.metrics import WorkerMetrics

pytestmark = pytest.mark.broker

#: What Prometheus makes itself.
OWN = {"up": set(), "ALERTS": {"alertname", "alertstate", "severity"}}
#: What it adds to all that it scrapes.
ADDED = {"job", "instance"}


class OverRabbitMQ:
    """Where a federation meets, and its transports."""

    def __init__(self, node: PrivateNode) -> None:
        self._config = config_of(node)
        self.transports: dict[str, AmqpAggregatorTransport | AmqpWorkerTransport] = {}

    def aggregator(self, run: str, *, prefetch: int) -> AmqpAggregatorTransport:
        made = AmqpAggregatorTransport(self._config, Topology(run), model_bytes=1000, prefetch=prefetch)
        self.transports["aggregator"] = made
        return made

    def worker(self, run: str, name: str) -> AmqpWorkerTransport:
        made = self.transports[name] = AmqpWorkerTransport(self._config, Topology(run), worker=name)
        return made

    def state(self, name: str) -> LinkState:
        return self.transports[name].state()


def get(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:  # noqa: S310 - of this machine
        return str(answer.read().decode())


def scraped(collector: Collector) -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with serve(MetricsConfig(port=port), collector) as served:
        return get(f"http://127.0.0.1:{served}/metrics")


def labels_by_name(pages: list[str]) -> dict[str, set[str]]:
    """Every name under which samples are, or would be, and the labels that they have."""
    declared = {one.name: set(one.labels) for series in SERIES.values() for one in series}
    result: dict[str, set[str]] = defaultdict(set)
    for family in (family for page in pages for family in text_string_to_metric_families(page)):
        for name in names_of(family):
            result[name] |= declared.get(name, set()) | ({"run"} if name.startswith("fedmq_") else set())
        for sample in family.samples:
            result[sample.name] |= set(sample.labels)
    return result


def names_of(family: Metric) -> Iterator[str]:
    yield {"counter": f"{family.name}_total"}.get(family.type, family.name)


def test_dashboard_and_alerts_ask_for_what_there_is(node: PrivateNode, tmp_path: Path) -> None:
    if isinstance(node, GivenNode):
        pytest.skip("whether the broker of TEST_RABBITMQ_URL has the plugin is not ours to say")
    place = OverRabbitMQ(node)
    meters = {
        "aggregator": AggregatorMetrics(RUN, tmp_path, workers=10, broker=partial(place.state, "aggregator")),
        "w1": WorkerMetrics(RUN, "w1", Role.TRAINER, broker=partial(place.state, "w1")),
    }
    settings = {"buffer_size": 1, "stop_after_rounds": 2}
    ended = federate(tmp_path, Line(), settings, {"w1": {}}, meters=meters, place=place)
    assert ended.outcome.reason == "done"
    base = node.prometheus_url.removesuffix("/metrics")
    detailed = f"{base}/metrics/detailed?family=queue_coarse_metrics&family=queue_consumer_count&family=queue_metrics"
    # RabbitMQ counts what is in its queues once a second.
    wait_for(lambda: "rabbitmq_detailed_queue_messages_bytes{" in get(detailed), what="figures of queues")

    pages = [scraped(meters["aggregator"]), scraped(meters["w1"])]
    exported = labels_by_name([*pages, *map(rabbitmqs, (node.prometheus_url, detailed))]) | OWN

    for asked in [*queries(), *page_queries()]:
        known: set[str] = set(ADDED)
        for name, labels in asked.query.metrics.items():
            assert name in exported, f"{asked.where} asks for {name}, which nobody exports"
            assert labels <= exported[name] | ADDED, f"{asked.where}: {name} has no label {labels - exported[name]}"
            known |= exported[name]
        assert asked.query.grouped <= known, f"{asked.where} groups by {asked.query.grouped - known}"
        assert asked.shown <= known | {"alertname"}, f"{asked.where} shows {asked.shown - known}"
    for page in pages:
        (sent,) = [line for line in page.splitlines() if line.startswith("fedmq_broker_sent_bytes_total{")]
        assert float(sent.rpartition(" ")[2]) > 500


def rabbitmqs(url: str) -> str:
    """Its page, without what its text format has that Prometheus' reader here does not take."""
    ours = ("rabbitmq_", "# TYPE rabbitmq_")
    return "".join(f"{line}\n" for line in get(url).splitlines() if line.startswith(ours))


def test_a_transport_says_how_it_stands_with_the_broker(node: PrivateNode) -> None:
    ends, topology = Ends(), fresh_topology()
    aggregator, inbox = ends.aggregator(config_of(node), topology)
    try:
        worker, _ = ends.worker(config_of(node), topology)
        before = aggregator.state()
        assert (before.connected, before.blocked, before.reconnects) == (True, False, 0)

        confirmed(worker.publish, Outgoing(body=bytes(100_000)))
        wait_for(lambda: inbox.deliveries(Source.UPDATE), what="the update")
        assert worker.state().sent_bytes > 100_000
        wait_for(lambda: aggregator.state().received_bytes > before.received_bytes + 100_000, what="its bytes")

        aggregator.drop()
        wait_for(lambda: aggregator.state().reconnects == 2 and aggregator.state().connected, what="two connections")
        assert aggregator.state().received_bytes > before.received_bytes + 100_000
    finally:
        ends.close()
    assert not aggregator.state().connected


def test_two_aggregators_and_one_port(node: PrivateNode, tmp_path: Path) -> None:
    """As processes: that the command serves what is set, and goes on without, can be seen there only."""
    store = CheckpointStore(tmp_path / "runs" / "twice" / "checkpoints", "twice")
    store.create(spec_of({"w": vector(0, 0)}), {"w": vector(0, 0)}, now=0.0)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ("aggregator", "--run", "twice", "--set", f"metrics.port={port}")

    with running(tmp_path, *command, url=node.url, name="first") as first:
        first.wait_log("leads run twice")
        with running(tmp_path, *command, url=node.url, name="second") as second:
            second.wait_log("standing by")
            assert second.log.count("no metrics: cannot listen") == 1
            assert "Traceback" not in second.log
            assert 'fedmq_aggregator_leads{run="twice"} 1.0' in get(f"http://127.0.0.1:{port}/metrics")
            assert second.terminate() == 0
        assert first.terminate() == 0
