"""Figures for Prometheus: what a series is, how it is counted, where it can be read.

Nothing is handed to ``prometheus_client`` while the program works: that takes microseconds a figure, and a small update
a few hundred in all. What is counted is counted in plain numbers (:class:`Histogram`, dictionaries), each by one
thread; they are put into form when somebody asks, on the thread of whoever asks.
"""

from __future__ import annotations

import contextlib
import logging
import re
import socket
import ssl
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from socketserver import TCPServer, ThreadingMixIn
from types import TracebackType
from typing import Any, Literal
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector, make_wsgi_app
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from broker.addresses import is_loopback
from broker.messages import NAME_PATTERN
from broker.settings import MetricsConfig
from broker.tls import server_context
from broker.transport import LinkState

__all__ = [
    "BROKER_SERIES",
    "BUILD",
    "OTHER",
    "Figures",
    "Histogram",
    "Names",
    "Series",
    "Stopwatch",
    "Value",
    "broker_sources",
    "half_decades",
    "serve",
]

log = logging.getLogger("fedmq.metrics")

#: What all workers are called that have no series of their own.
OTHER = "other"


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """One name under which figures are exported. There is one object of each, which is quick to look up."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    """Besides those that all of the program's series have."""
    bounds: tuple[float, ...] = ()
    """Of a histogram: the upper bounds of its buckets."""


class Histogram:
    """How many values there were up to each bound. One thread observes, any may look."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """``bounds`` rise; what is above the last is counted as well."""
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count ``value``."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many values there were."""
        return sum(self.counts)

    def buckets(self) -> list[tuple[str, float]]:
        """Each bound with the number of values up to it."""
        result, below = [], 0
        for bound, count in zip((*self.bounds, float("inf")), list(self.counts), strict=True):
            below += count
            result.append(("+Inf" if bound == float("inf") else repr(float(bound)), float(below)))
        return result


class Stopwatch:
    """A context whose seconds go into a histogram. One at a time, and by one thread."""

    __slots__ = ("_began", "histogram")

    def __init__(self, histogram: Histogram) -> None:
        self.histogram = histogram
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.histogram.observe(time.perf_counter() - self._began)


class Names:
    """The workers that have series of their own: the first ones, so that their number is bounded whoever comes.

    What stands in a message that was rejected may be no worker's name at all.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: dict[str, str] = {}

    def __call__(self, worker: str) -> str:
        """Under which name ``worker`` is counted."""
        known = self._known.get(worker)
        if known is not None:
            return known
        if len(self._known) >= self._most or re.fullmatch(NAME_PATTERN, worker) is None:
            return OTHER
        return self._known.setdefault(worker, worker)


#: One number, one for each value of the labels, a histogram; or None for what is not known.
Value = float | Mapping[tuple[str, ...], float] | Histogram | None


class Figures(Collector):
    """What one program exports.

    Args:
        common: labels that all of its series have.
        sources: where each one's value comes from; called by whoever asks for the figures.
    """

    def __init__(self, common: Mapping[str, str], sources: Mapping[Series, Callable[[], Value]]) -> None:
        self._common = dict(common)
        self._sources = dict(sources)

    def collect(self) -> Iterable[Metric]:
        """All figures as they are now."""
        for series, source in self._sources.items():
            yield self._family(series, source())

    def _family(self, series: Series, value: Value) -> Metric:
        names = (*self._common, *series.labels)
        common = tuple(self._common.values())
        if isinstance(value, Histogram):
            histogram = HistogramMetricFamily(series.name, series.help, labels=names)
            histogram.add_metric(common, value.buckets(), value.total)
            return histogram
        kind = CounterMetricFamily if series.kind == "counter" else GaugeMetricFamily
        family = kind(series.name, series.help, labels=names)
        values = {} if value is None else {(): value} if isinstance(value, int | float) else dict(value)
        for labels, number in values.items():
            family.add_metric((*common, *labels), number)
        return family


BUILD = Series("fedmq_build_info", "gauge", "Always 1; which version of fedmq this is.", ("version",))
#: How the program stands with its broker; on both sides.
BROKER_SERIES = (
    Series("fedmq_broker_connected", "gauge", "1 if all connections to the broker stand, else 0."),
    Series("fedmq_broker_blocked", "gauge", "1 while the broker takes no messages: a memory or disk alarm. Else 0."),
    Series("fedmq_broker_reconnects_total", "counter", "How often a connection to the broker was made again."),
    Series("fedmq_broker_sent_bytes_total", "counter", "Bytes sent to the broker, packed and coded as they go."),
    Series("fedmq_broker_received_bytes_total", "counter", "Bytes received from the broker, as they come."),
)


def broker_sources(state: Callable[[], LinkState | None]) -> dict[Series, Callable[[], Value]]:
    """Where the values of ``BROKER_SERIES`` come from; ``state`` says None as long as there is no transport."""

    def of(read: Callable[[LinkState], float]) -> Callable[[], Value]:
        def value() -> Value:
            now = state()
            return None if now is None else read(now)

        return value

    reads: tuple[Callable[[LinkState], float], ...] = (
        lambda now: now.connected,
        lambda now: now.blocked,
        lambda now: now.reconnects,
        lambda now: now.sent_bytes,
        lambda now: now.received_bytes,
    )
    return {BUILD: _version, **dict(zip(BROKER_SERIES, map(of, reads), strict=True))}


def half_decades(first: int, last: int) -> tuple[float, ...]:
    """Bounds from 10 to the power of ``first`` to 10 to the power of ``last``: 1, 3, 10, 30 and so on."""
    return (*(float(f"{digit}e{power}") for power in range(first, last) for digit in (1, 3)), float(f"1e{last}"))


class _Handler(WSGIRequestHandler):
    timeout = 10.0
    """Whoever connects and says nothing is hung up on."""

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class calls it so
        """Say nothing of each request."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def encrypt(self, context: ssl.SSLContext) -> None:
        """Speak TLS. Each handshake is made by the thread that answers, so that nobody waits for somebody's."""
        self.socket = context.wrap_socket(self.socket, server_side=True, do_handshake_on_connect=False)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hangs up, or does not speak TLS, is no news."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def server_bind(self) -> None:
        """As the base class, but without asking for the host's name, which can take half a minute."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = self.server_address[:2]  # type: ignore[assignment]
        self.setup_environ()


class _Server6(_Server):
    address_family = socket.AF_INET6


@contextlib.contextmanager
def serve(config: MetricsConfig, figures: Collector) -> Iterator[int | None]:
    """Serve ``figures``, and those of the process, within the block; the port, or None if it could not be had.

    Metrics are not worth a run: if the port is taken or the address is not this machine's, that is said once.
    Raises :class:`ConfigError` for a certificate that cannot be used.
    """
    registry = CollectorRegistry()
    for collector in (PlatformCollector(registry=None), ProcessCollector(registry=None), figures):
        registry.register(collector)
    context = server_context(
        certificate_file=config.certificate_file,
        key_file=config.key_file,
        client_ca_file=config.client_ca_file,
        table="metrics",
    )
    kind = _Server6 if ":" in config.address else _Server
    try:
        server = make_server(config.address, config.port, make_wsgi_app(registry), kind, _Handler)
    except OSError as error:
        log.warning(
            "no metrics: cannot listen at %s, port %d (%s). Each process of a machine needs a port of its own: set "
            "metrics.port (or metrics.address), or metrics.port=0 for no metrics. The run goes on",
            config.address,
            config.port,
            error.strerror or error,
        )
        yield None
        return
    if context is not None:
        server.encrypt(context)
    elif not is_loopback(config.address):
        log.warning(
            "metrics are for whoever can reach %s, and unencrypted: see metrics.certificate_file", config.address
        )
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    host = f"[{config.address}]" if ":" in config.address else config.address
    log.info("metrics at %s://%s:%d/metrics", "http" if context is None else "https", host, server.server_port)
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _version() -> Value:
    try:
        return {(metadata.version("fedmq"),): 1.0}
    except metadata.PackageNotFoundError:
        return {("unknown",): 1.0}
