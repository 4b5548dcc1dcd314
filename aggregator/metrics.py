"""An aggregator's figures for Prometheus. What they are called and mean: ``SERIES``, and docs/metrics.md."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.federated import Federated
from aggregator.core.machine import RoundMachine
from aggregator.core.snapshot import Entry, VersionRecord
from aggregator.core.timing import Timing
from aggregator.meter import Meter
from aggregator.reign import Reign
from broker.messages import Reason, Role
from broker.metrics import OTHER, Figures, Histogram, Names, Series, Stopwatch, Value, broker_sources, half_decades
from broker.transport import Delivery, LinkState

__all__ = ["SERIES", "AggregatorMetrics"]

#: From ten microseconds, a small update, to ten seconds, one of gigabytes.
WORK = half_decades(-5, 1)
#: From a millisecond, a small model and a fast disk, to a quarter of an hour.
TRANSFER = half_decades(-3, 3)
#: Workers' figures and evaluators' are whatever they send; so many names are shown.
MOST_METRICS = 50

_A = "fedmq_aggregator"
_W = "fedmq_aggregator_worker"
LEADS = Series(f"{_A}_leads", "gauge", "1 if this aggregator is the run's active one, 0 if it stands by.")
VERSION = Series(f"{_A}_version", "gauge", "The newest version of the parameters.")
EPOCH = Series(f"{_A}_epoch", "gauge", "Which reign over the run this is; each takeover and restart raises it.")
FILL = Series(f"{_A}_buffer_updates", "gauge", "Updates in the buffer, of the round that is open.")
GOAL = Series(f"{_A}_buffer_goal_updates", "gauge", "Updates at which the open round closes, as far as is known.")
PAUSED = Series(f"{_A}_paused", "gauge", "1 while an operator has paused the run, else 0.")
DONE = Series(f"{_A}_done", "gauge", "1 once the run is over, else 0.")
MADE_AT = Series(
    f"{_A}_version_timestamp_seconds", "gauge", "When the newest version became durable, or this reign began."
)
RECEIVED = Series(f"{_A}_updates_received_total", "counter", "Updates that the broker delivered, repeats included.")
FOLDED = Series(f"{_A}_updates_folded_total", "counter", "Updates that went into the buffer; each counts once.")
DUPLICATE = Series(f"{_A}_updates_duplicate_total", "counter", "Updates that came again and did not count again.")
REJECTED = Series(f"{_A}_updates_rejected_total", "counter", "Updates that were not taken, by reason.", ("reason",))
DEAD = Series(f"{_A}_dead_letters_total", "counter", "Rejected updates that arrived in the run's dead-letter queue.")
VERSIONS = Series(f"{_A}_versions_total", "counter", "Versions that were made.")
BYTES = Series(f"{_A}_update_bytes_total", "counter", "Size of the updates received, coded and packed as they came.")
PLAIN_BYTES = Series(f"{_A}_update_uncompressed_bytes_total", "counter", "What those would be as plain tensors.")
SENT_BYTES = Series(
    f"{_A}_broadcast_uncompressed_bytes_total",
    "counter",
    "Size of the versions broadcast, as plain tensors; as sent: fedmq_broker_sent_bytes_total.",
)
DECODE = Series(f"{_A}_decode_seconds", "histogram", "Reading and checking an update's message.", bounds=WORK)
FOLD = Series(f"{_A}_fold_seconds", "histogram", "Adding an update to the buffer.", bounds=WORK)
STEP = Series(f"{_A}_step_seconds", "histogram", "Making a version of the buffer: rule and optimiser.", bounds=WORK)
CHECKPOINT = Series(
    f"{_A}_checkpoint_seconds", "histogram", "From handing a checkpoint over until it is durable.", bounds=TRANSFER
)
FAILED = Series(f"{_A}_checkpoint_failures_total", "counter", "Checkpoints that could not be written; tried again.")
BROADCAST = Series(
    f"{_A}_broadcast_seconds", "histogram", "From handing a version over until the broker has it.", bounds=TRANSFER
)
ROUND = Series(f"{_A}_round_seconds", "histogram", "From a round's opening until its version is made.", bounds=TRANSFER)
STALENESS = Series(
    f"{_A}_staleness_versions",
    "histogram",
    "Versions made between an update's base and its folding.",
    bounds=(0, 1, 2, 3, 5, 8, 13, 21, 34, 55, 100),
)
EVALUATION = Series(
    f"{_A}_evaluation",
    "gauge",
    "Newest figures: split train (mean loss of a version's updates), test (evaluator), workers (on data held out).",
    ("split", "metric"),
)
PRESENT = Series(f"{_A}_workers", "gauge", "Workers that are here; role trainer or evaluator.", ("role",))
FREE = Series(f"{_A}_folder_free_bytes", "gauge", "Room on the disk of the run's folder.")

WORKER_PRESENT = Series(f"{_W}_present", "gauge", "1 if the worker is here, else 0.", ("worker",))
WORKER_SILENT = Series(
    f"{_W}_silent", "gauge", "1 if it went without a goodbye: crashed, hangs or cut off. Else 0.", ("worker",)
)
WORKER_FOLDED = Series(f"{_W}_updates_folded_total", "counter", "Updates of the worker that counted.", ("worker",))
WORKER_REJECTED = Series(
    f"{_W}_updates_rejected_total", "counter", "Updates of the worker that were not taken.", ("worker", "reason")
)
WORKER_TRAINING = Series(
    f"{_W}_training_seconds_total", "counter", "Time behind its folded updates, as the worker says.", ("worker",)
)
WORKER_STALENESS = Series(
    f"{_W}_staleness_versions_total", "counter", "Sum of the staleness of its folded updates.", ("worker",)
)
WORKER_LAST = Series(f"{_W}_last_update_timestamp_seconds", "gauge", "When its last update was folded.", ("worker",))
WORKER_LOSS = Series(f"{_W}_loss", "gauge", "Training loss of its last folded update.", ("worker",))
WORKER_NORM = Series(
    f"{_W}_update_norm", "gauge", "Norm of its last folded update; known if norms are limited.", ("worker",)
)
WORKER_COSINE = Series(
    f"{_W}_cosine", "gauge", "Of its last update with what its round made of all; robust rules only.", ("worker",)
)
WORKER_SCORE = Series(f"{_W}_score", "gauge", "What is held against the worker; 0 is good.", ("worker",))
WORKER_QUARANTINED = Series(f"{_W}_quarantined", "gauge", "1 while nothing is taken from it, else 0.", ("worker",))

#: All that an aggregator exports, besides what both sides do.
SERIES = tuple(value for value in list(globals().values()) if isinstance(value, Series))


@dataclass(slots=True)
class _Row:
    """What is counted of one worker, or of all that share a name; None for what is not known."""

    present: bool | None = None
    silent: bool | None = None
    folded: int = 0
    training: float = 0.0
    staleness: int = 0
    last: float | None = None
    loss: float | None = None
    norm: float | None = None
    cosine: float | None = None
    rejected: Counter[str] = field(default_factory=Counter)


#: What a row says for a series.
_READ: Mapping[Series, Callable[[_Row], float | None]] = {
    WORKER_PRESENT: lambda row: row.present,
    WORKER_SILENT: lambda row: row.silent,
    WORKER_FOLDED: lambda row: row.folded,
    WORKER_TRAINING: lambda row: row.training,
    WORKER_STALENESS: lambda row: row.staleness,
    WORKER_LAST: lambda row: row.last,
    WORKER_LOSS: lambda row: row.loss,
    WORKER_NORM: lambda row: row.norm,
    WORKER_COSINE: lambda row: row.cosine,
}


class AggregatorMetrics(Meter, Collector):
    """Counts what an aggregator does.

    Args:
        run: the run's name, a label of all series.
        folder: the run's, whose disk is looked at.
        workers: how many have series of their own.
        broker: how the transport stands with the broker.
    """

    def __init__(
        self, run: str, folder: Path, *, workers: int, broker: Callable[[], LinkState | None] = lambda: None
    ) -> None:
        self._folder = folder
        self._names = Names(workers)
        self._broker = broker
        self._reign: Reign | None = None
        self._leads: Callable[[], bool] = lambda: False
        self._counts: Counter[Series] = Counter()
        # All from the beginning: Prometheus does not see a counter's first step if it appears with it.
        self._reasons: Counter[tuple[str, ...]] = Counter({(reason.value,): 0 for reason in Reason})
        self._rows: dict[str, _Row] = {}
        self._roles: dict[str, Role] = {}
        self._goal: int | None = None
        self._made_at: float | None = None
        self._evaluations: dict[str, Mapping[str, float]] = {}
        self._evaluated_version = -1
        self._histograms = {series: Histogram(series.bounds) for series in SERIES if series.kind == "histogram"}
        self.decode = Stopwatch(self._histograms[DECODE])
        self._timing = Timing(Stopwatch(self._histograms[FOLD]), Stopwatch(self._histograms[STEP]))
        self._figures = Figures({"run": run}, {**broker_sources(broker), **self._sources()})

    def collect(self) -> Iterable[Metric]:
        """All figures as they are now; called by whoever asks for them, on a thread of its own."""
        return self._figures.collect()

    # --------------------------------------------------------------------------------------------- what is told

    def watch(self, leads: Callable[[], bool]) -> None:
        """See the port."""
        self._leads, self._reign = leads, None
        self._roles, self._evaluated_version = {}, -1  # versions may have been taken back
        for row in self._rows.values():  # who stands by does not know
            row.present = row.silent = None

    def reigns(self, reign: Reign) -> None:
        """See the port."""
        self._reign = reign
        reign.machine.timing = self._timing
        self._made_at = time.time()
        self._goal = None
        self._roles = dict.fromkeys(reign.trainers, Role.TRAINER)
        for worker in reign.trainers:
            self._present(worker, here=True, silent=False)

    def received(self, delivery: Delivery, event: on.Happening) -> None:
        """See the port. An update in chunks is delivered twice, and with its chunks the second time."""
        counts = self._counts
        if delivery.chunks is not None:
            counts[BYTES] += sum(map(len, delivery.chunks))
        elif not delivery.lost:
            counts[RECEIVED] += 1
            counts[BYTES] += len(delivery.body)
        if isinstance(event, on.Arrived):
            counts[PLAIN_BYTES] += event.update.model.nbytes

    def records(self, fact: do.Fact, version: int) -> None:
        """See the port."""
        match fact:
            case do.Folded(entry, _, goal, _):
                self._folded(entry, goal)
            case do.VersionMade(record):
                self._made(record)
            case do.Rejected(worker, reason, count=count):
                self._reasons[(reason.value,)] += count
                self._row(worker).rejected[reason.value] += count
            case do.Repeated():
                self._counts[DUPLICATE] += 1
            case do.EvaluationRecord(_, evaluated, metrics) if evaluated >= self._evaluated_version:
                self._evaluated_version, self._evaluations["test"] = evaluated, metrics
            case Federated():
                self._evaluations["workers"] = {name: spread.mean for name, spread in fact.metrics.items()}
            case do.Came(worker, role):
                self._roles[worker] = role
                self._present(worker, here=True, silent=False)
            case do.Went(worker, _, reason):
                self._roles.pop(worker, None)
                self._present(worker, here=False, silent=not reason)
            case _:
                del version

    def writing(self, outcome: Future[on.CheckpointWritten | on.CheckpointFailed | None]) -> None:
        """See the port."""
        outcome.add_done_callback(partial(self._written, time.perf_counter()))

    def broadcasting(self, sent: Future[None], nbytes: int) -> None:
        """See the port."""
        self._counts[SENT_BYTES] += nbytes
        sent.add_done_callback(partial(self._sent, time.perf_counter()))

    # -------------------------------------------------------------------------------------------- what is counted

    def _folded(self, entry: Entry, goal: int) -> None:
        self._counts[FOLDED] += 1
        self._goal = goal
        self._histograms[STALENESS].observe(entry.staleness)
        row = self._row(entry.id.worker)
        row.folded += 1
        row.training += max(0.0, entry.seconds)
        row.staleness += entry.staleness
        row.last, row.loss, row.norm = time.time(), entry.loss, entry.norm

    def _made(self, record: VersionRecord) -> None:
        self._counts[VERSIONS] += 1
        self._made_at = time.time()
        self._histograms[ROUND].observe(record.seconds)
        if record.loss is not None:
            self._evaluations["train"] = {"loss": record.loss}
        for entry in record.updates:
            if entry.cosine is not None:
                self._row(entry.id.worker).cosine = entry.cosine

    def _present(self, worker: str, *, here: bool, silent: bool) -> None:
        row = self._row(worker)
        row.present, row.silent = here, silent

    def _row(self, worker: str) -> _Row:
        name = self._names(worker)
        row = self._rows.get(name)
        if row is None:
            row = self._rows[name] = _Row()
        return row

    def _written(self, began: float, outcome: Future[on.CheckpointWritten | on.CheckpointFailed | None]) -> None:
        if outcome.exception() is not None or outcome.result() is None:
            return
        if isinstance(outcome.result(), on.CheckpointFailed):
            self._counts[FAILED] += 1
        else:
            self._histograms[CHECKPOINT].observe(time.perf_counter() - began)

    def _sent(self, began: float, sent: Future[None]) -> None:
        if sent.exception() is None:
            self._histograms[BROADCAST].observe(time.perf_counter() - began)

    # ------------------------------------------------------------------------------------- what is asked for

    def _sources(self) -> dict[Series, Callable[[], Value]]:
        counted: dict[Series, Callable[[], Value]] = {}
        for series in SERIES:
            if series.kind == "histogram":
                counted[series] = partial(self._histograms.__getitem__, series)
            elif series in _READ:
                counted[series] = partial(self._of_workers, series, _READ[series])
            else:
                counted[series] = partial(self._counts.__getitem__, series)
        read: dict[Series, Callable[[], Value]] = {
            LEADS: lambda: float(self._leads()),
            VERSION: self._of_machine(lambda machine: machine.version),
            EPOCH: lambda: None if self._reign is None else self._reign.epoch,
            FILL: self._of_machine(lambda machine: machine.fill),
            GOAL: lambda: self._goal,
            PAUSED: self._of_machine(lambda machine: machine.controls.paused),
            DONE: self._of_machine(lambda machine: machine.done),
            MADE_AT: lambda: self._made_at,
            REJECTED: lambda: {**self._reasons},
            DEAD: self._dead_letters,
            EVALUATION: self._evaluated,
            PRESENT: self._workers,
            FREE: self._free,
            WORKER_REJECTED: self._rejected,
            WORKER_SCORE: self._scores,
            WORKER_QUARANTINED: self._quarantined,
        }
        return counted | read

    def _of_machine(self, read: Callable[[RoundMachine], float]) -> Callable[[], Value]:
        return lambda: None if self._reign is None else read(self._reign.machine)

    def _of_workers(self, series: Series, read: Callable[[_Row], float | None]) -> Value:
        # Of all that share a name there are sums; there is no one loss, and no last time.
        is_sum = series.kind == "counter"
        values = {(name,): read(row) for name, row in dict(self._rows).items() if is_sum or name != OTHER}
        return {labels: value for labels, value in values.items() if value is not None}

    def _rejected(self) -> Value:
        rows = dict(self._rows).items()
        return {(name, reason): count for name, row in rows for reason, count in dict(row.rejected).items()}

    def _dead_letters(self) -> Value:
        state = self._broker()
        return None if state is None else state.dead_letters

    def _evaluated(self) -> Value:
        return {
            (split, name): value
            for split, metrics in dict(self._evaluations).items()
            for name, value in list(metrics.items())[:MOST_METRICS]
        }

    def _workers(self) -> Value:
        here = Counter(dict(self._roles).values())
        return {(role.value,): here[role] for role in Role}

    def _free(self) -> Value:
        try:
            stat = os.statvfs(self._folder)
        except OSError:
            return None
        return stat.f_bavail * stat.f_frsize

    def _scores(self) -> Value:
        if self._reign is None:
            return None
        machine = self._reign.machine
        return {(name,): machine.screening.standings.score(name, machine.version) for name in self._known()}

    def _quarantined(self) -> Value:
        if self._reign is None:
            return None
        kept_out = self._reign.machine.screening.standings.kept_out
        return {(name,): name in kept_out for name in self._known()}

    def _known(self) -> list[str]:
        return [name for name in list(self._rows) if name != OTHER]
