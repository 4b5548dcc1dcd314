"""A worker's figures for Prometheus. What they are called and mean: ``SERIES``, and docs/metrics.md."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from broker.messages import Reason, Role
from broker.metrics import Figures, Histogram, Series, Value, broker_sources, half_decades
from broker.transport import Delivery, LinkState, Source
from worker_client.core import events as ev
from worker_client.core.machine import State
from worker_client.mailbox import Finished, Item, Published
from worker_client.meter import Meter, Standing

__all__ = ["SERIES", "WorkerMetrics"]

#: From ten milliseconds, a toy, to three hours.
TRAINING = half_decades(-2, 4)
#: From a millisecond, a small update on one machine, to a quarter of an hour.
TRANSFER = half_decades(-3, 3)
#: A task may give any number of metrics; so many are shown.
MOST_METRICS = 50

_W = "fedmq_worker"
STATE = Series(f"{_W}_state", "gauge", "1 for the state that the worker is in, 0 for the others.", ("state",))
VERSION = Series(f"{_W}_version", "gauge", "The newest version that it knows of; -1 for none yet.")
CONFIRMED = Series(f"{_W}_updates_confirmed_total", "counter", "Updates that the broker confirmed to this process.")
OUTSTANDING = Series(f"{_W}_outstanding_updates", "gauge", "Updates that are trained and not confirmed.")
REJECTED = Series(
    f"{_W}_updates_rejected_total", "counter", "Updates that the aggregator rejected, as far as it told.", ("reason",)
)
REFUSED = Series(
    f"{_W}_messages_refused_total",
    "counter",
    "Versions and notices that were not believed for their signature: somebody on the broker forges or replays.",
)
RETRIES = Series(f"{_W}_publish_failures_total", "counter", "Times that an update did not get through; tried again.")
TRAINED = Series(f"{_W}_training_seconds", "histogram", "Training for one update.", bounds=TRAINING)
EVALUATED = Series(f"{_W}_evaluation_seconds", "histogram", "Evaluating a version.", bounds=TRAINING)
UPLOAD = Series(
    f"{_W}_upload_seconds", "histogram", "From publishing an update until the broker has it.", bounds=TRANSFER
)
UPLOADED = Series(
    f"{_W}_upload_uncompressed_bytes_total",
    "counter",
    "Size of the updates published, as plain tensors; as sent: fedmq_broker_sent_bytes_total.",
)
DOWNLOAD = Series(
    f"{_W}_download_seconds", "histogram", "Downloading a version that travels in chunks.", bounds=TRANSFER
)
DOWNLOADED = Series(f"{_W}_download_bytes_total", "counter", "Size of the versions received, packed and coded.")
PLAIN = Series(f"{_W}_download_uncompressed_bytes_total", "counter", "What those would be as plain tensors.")
METRIC = Series(f"{_W}_metric", "gauge", "Of the last training; of an evaluator, the last evaluation.", ("metric",))

#: All that a worker or an evaluator exports, besides what both sides do.
SERIES = tuple(value for value in list(globals().values()) if isinstance(value, Series))


class WorkerMetrics(Meter, Collector):
    """Counts what one worker does.

    Args:
        run: the run's name, and ``worker`` and ``role``: labels of all series.
        worker: its name.
        role: whether it trains or evaluates.
        broker: how the transport stands with the broker.
    """

    def __init__(
        self, run: str, worker: str, role: Role, *, broker: Callable[[], LinkState | None] = lambda: None
    ) -> None:
        self._standing: Callable[[], Standing] | None = None
        self._model_bytes = 0
        self._role = role
        self._began: dict[Series, float] = {}
        self._counts: Counter[Series] = Counter()
        self._reasons: Counter[tuple[str, ...]] = Counter()
        self._metrics: Mapping[str, float] = {}
        self._histograms = {series: Histogram(series.bounds) for series in SERIES if series.kind == "histogram"}
        common = {"run": run, "worker": worker, "role": role.value}
        self._figures = Figures(common, {**broker_sources(broker), **self._sources()})

    def collect(self) -> Iterable[Metric]:
        """All figures as they are now; called by whoever asks for them, on a thread of its own."""
        return self._figures.collect()

    # --------------------------------------------------------------------------------------------- what is told

    def watch(self, standing: Callable[[], Standing], model_bytes: int) -> None:
        """See the port."""
        self._standing, self._model_bytes = standing, model_bytes

    def receives(self, item: Item) -> None:
        """See the port."""
        match item:
            case Delivery(source=Source.PARAMETERS):
                self._came(item)
            case Published(None):
                self._took(UPLOAD)
            case Published():
                self._counts[RETRIES] += 1
            case Finished(result, None) if result is not None:
                is_training = hasattr(result, "tensors")  # by its class, it would take torch to know
                self._histograms[TRAINED if is_training else EVALUATED].observe(result.seconds)
                if is_training or self._role is Role.EVALUATOR:
                    self._metrics = result.metrics

    def does(self, effect: ev.Effect) -> None:
        """See the port."""
        match effect:
            case ev.Publish():
                self._counts[UPLOADED] += self._model_bytes
                self._began[UPLOAD] = time.monotonic()
            case ev.PublishAgain():
                self._began.setdefault(UPLOAD, time.monotonic())
            case ev.Download():
                self._began[DOWNLOAD] = time.monotonic()

    def rejected(self, reason: Reason) -> None:
        """See the port."""
        self._reasons[(reason.value,)] += 1

    def _came(self, delivery: Delivery) -> None:
        if delivery.lost:
            return
        self._counts[DOWNLOADED] += len(delivery.body) if delivery.chunks is None else sum(map(len, delivery.chunks))
        if delivery.chunks is not None:
            self._took(DOWNLOAD)
        if delivery.chunks is not None or "chunks" not in delivery.headers:
            self._counts[PLAIN] += self._model_bytes

    def _took(self, what: Series) -> None:
        began = self._began.pop(what, None)
        if began is not None:
            self._histograms[what].observe(time.monotonic() - began)

    # ------------------------------------------------------------------------------------- what is asked for

    def _sources(self) -> dict[Series, Callable[[], Value]]:
        counted: dict[Series, Callable[[], Value]] = {}
        for series in SERIES:
            of = self._histograms if series.kind == "histogram" else self._counts
            counted[series] = partial(of.__getitem__, series)
        read: dict[Series, Callable[[], Value]] = {
            STATE: self._states,
            VERSION: self._of_standing(lambda now: now.version),
            CONFIRMED: self._of_standing(lambda now: now.confirmed),
            REFUSED: self._of_standing(lambda now: now.refused),
            OUTSTANDING: self._of_standing(lambda now: now.outstanding),
            REJECTED: lambda: {**self._reasons},
            METRIC: self._last,
        }
        return counted | read

    def _of_standing(self, read: Callable[[Standing], float]) -> Callable[[], Value]:
        return lambda: None if self._standing is None else read(self._standing())

    def _states(self) -> Value:
        now = None if self._standing is None else self._standing().state
        return {(state.value,): state.value == now for state in State}

    def _last(self) -> Value:
        return {(name,): value for name, value in list(self._metrics.items())[:MOST_METRICS]}
