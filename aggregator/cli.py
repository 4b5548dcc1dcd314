"""``fedmq aggregator``, also ``python -m aggregator``."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.disk import replace_file
from aggregator.meter import Meter, Meters
from aggregator.process import tune
from aggregator.reign import rules_of
from aggregator.results import Outcome
from aggregator.service import AggregatorService
from aggregator.tracking import tracker_names, trackers_of
from aggregator.tracking.follow import tracking
from broker.amqp.transport import AmqpAggregatorTransport
from broker.console import (
    BrokerOption,
    ConfigOption,
    LogFormatOption,
    RunOption,
    SetOption,
    VerboseOption,
    guard,
    parse_flags,
    service_logging,
    stop_on_signals,
)
from broker.errors import CheckpointError, CheckpointNotWritten, StaleEpoch
from broker.logs import describe
from broker.settings import LogConfig, MetricsConfig, Settings, Table, load, plain
from broker.topology import Topology
from broker.tracing import tracer_for

__all__ = ["aggregator", "checkpoint_folder", "main", "run_folder", "serve"]

log = logging.getLogger("fedmq.aggregator")

#: Being superseded more often than this in so many seconds is no takeover, but two that do not know each other.
RIVAL_TIMES = 3
RIVAL_SECONDS = 60.0

FolderOption = Annotated[
    Path | None, typer.Option("--folder", help="The run's folder, runs/<run>; checkpoints are in <folder>/checkpoints.")
]


def aggregator(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    folder: FolderOption = None,
    settings: SetOption = None,
    accept_older: Annotated[
        bool, typer.Option("--accept-older", help="Go on from an older checkpoint than the run has seen.")
    ] = False,
    drop_changes: Annotated[
        bool, typer.Option("--drop-changes", help="Forget what 'fedmq set' and 'fedmq stop' have changed.")
    ] = False,
    log_format: LogFormatOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Buffer updates, apply them, make them durable, broadcast new versions, until the run is done.

    Goes on where the run's newest checkpoint stands. A second one of the same run, with the same folder, stands by
    and takes over when the first is gone or hangs. SIGTERM commits what is folded and exits 0; updates that
    are not in a checkpoint go back to the queue.

    Example: fedmq aggregator --run digits --set aggregator.buffer_size=4
    """
    with guard():
        service_logging(verbose, log_format)
        tune()
        own = {"aggregator__folder": folder, "log__format": log_format}
        flags = parse_flags(settings or [], run=run, broker__url=broker, **own)
        kinds: dict[str, type[Table]] = {"aggregator": AggregatorConfig, "metrics": MetricsConfig, "log": LogConfig}
        read = load(kinds, file=config, flags=flags)
        service_logging(verbose, read.table("log", LogConfig).format)
        describe(role="aggregator", run=read.run)
        serve(read, accept_older=accept_older, drop_changes=drop_changes)


def run_folder(settings: Settings) -> Path:
    """The folder of the run's results."""
    return settings.table("aggregator", AggregatorConfig).folder or Path("runs") / settings.run


def checkpoint_folder(settings: Settings) -> Path:
    """The folder of the run's checkpoints."""
    return run_folder(settings) / "checkpoints"


def serve(settings: Settings, *, accept_older: bool = False, drop_changes: bool = False) -> Outcome | None:
    """Run the aggregator that ``settings`` describe until it is done or a signal comes; None if it only stood by.

    One that is superseded stands by again, under the newest state.
    """
    config = settings.table("aggregator", AggregatorConfig)
    folder = run_folder(settings)
    store = CheckpointStore(checkpoint_folder(settings), settings.run, keep=config.keep_checkpoints)
    # Its own checksum is enough here: who leads reads the tensors when it is its turn, and their checksum with them.
    head = store.head()
    # Now, not at the takeover: a standby with other settings would be none.
    rules_of(config, head, {} if drop_changes else head.changes)
    size = head.model.nbytes
    _write_settings(settings, folder)
    stop = threading.Event()
    serving: list[AggregatorService] = []
    ousted: list[float] = []

    def stop_serving() -> None:
        for service in serving:
            service.stop()

    tracked = tracking(
        trackers_of(tracker_names(config.tracking)),
        run=settings.run,
        folder=folder,
        settings=plain(settings),
        leads=lambda: bool(serving) and serving[0].leads and serving[0].has_claimed,
    )
    transports: list[AmqpAggregatorTransport] = []
    with (
        stop_on_signals(stop, also=stop_serving),
        _metered(settings, folder, transports) as counted,
        _traced(settings.run, counted) as meter,
        tracked,
    ):
        while not stop.is_set():
            service = AggregatorService(
                folder=folder,
                run=settings.run,
                config=config,
                store=store,
                chunk_bytes=settings.broker.chunk_bytes,
                pack_chunks=settings.broker.pack_chunks,
                accept_older=accept_older,
                drop_changes=drop_changes,
                meter=meter,
            )
            serving[:] = [service]
            if stop.is_set():
                break
            try:
                transports[:] = [_transport(settings, config, size, _epoch_after(store, service))]
                return service.run(transports[0])
            except StaleEpoch as error:
                by_command = _by_command(store)
                log.warning("%s; %s", error, "a command has: taking up what it made" if by_command else "standing by")
                if service.leads and not by_command:
                    ousted.append(time.monotonic())
                    _require_no_rival(ousted, folder)
            if service.has_claimed:
                accept_older = drop_changes = False
    return None


@contextlib.contextmanager
def _metered(settings: Settings, folder: Path, transports: list[AmqpAggregatorTransport]) -> Iterator[Meter]:
    """What counts, and serves the figures if that is wanted; ``transports`` holds the one that is used, if any."""
    config = settings.table("metrics", MetricsConfig)
    if not config.port:
        yield Meter()
        return
    # Here, because whoever wants no metrics need not wait for it.
    from aggregator.metrics import AggregatorMetrics  # noqa: PLC0415
    from broker.metrics import serve as serve_metrics  # noqa: PLC0415

    metrics = AggregatorMetrics(
        settings.run,
        folder,
        workers=config.workers,
        broker=lambda: transports[0].state() if transports else None,
    )
    with serve_metrics(config, metrics):
        yield metrics


@contextlib.contextmanager
def _traced(run: str, meter: Meter) -> Iterator[Meter]:
    """``meter``, and what makes traces if they are wanted."""
    with tracer_for("aggregator", run=run) as tracer:
        if tracer is None:
            yield meter
            return
        from aggregator.tracing import AggregatorTraces  # noqa: PLC0415 (optional)

        yield Meters(meter, AggregatorTraces(tracer, run))


def _transport(
    settings: Settings, config: AggregatorConfig, size: int, epoch_after: Callable[[int], int | None]
) -> AmqpAggregatorTransport:
    return AmqpAggregatorTransport(
        settings.broker,
        Topology(settings.run),
        model_bytes=size,
        prefetch=config.prefetch(size),
        consumer_tag=f"aggregator/{socket.gethostname()}/{os.getpid()}",
        epoch_after=epoch_after,
    )


def _epoch_after(store: CheckpointStore, service: AggregatorService) -> Callable[[int], int | None]:
    """For people who look at consumers: the epoch that ``service`` has, or is about to claim."""

    def epoch_after(newest: int) -> int | None:
        try:
            stored = store.stored_epoch()
        except CheckpointError:
            return None  # who claims it will say so
        return stored if service.has_claimed else max(stored, newest) + 1

    return epoch_after


def _write_settings(settings: Settings, folder: Path) -> None:
    content = tomli_w.dumps(plain(settings)).encode()
    try:
        replace_file(folder / "config.toml", lambda file: file.write(content))
    except OSError as error:
        raise CheckpointNotWritten(f"{folder}: {error.strerror}; make room or make the folder writable") from None


def _by_command(store: CheckpointStore) -> bool:
    """Whether it was a command that superseded the aggregator, like ``fedmq rollback``: it does so once."""
    head = store.head()
    return any(record.epoch == head.epoch and record.source is not None for record in head.records)


def _require_no_rival(ousted: list[float], folder: Path) -> None:
    """Raise :class:`StaleEpoch` if this aggregator was superseded again and again while it had the turn.

    Who takes over on the same broker has the turn itself. A command like ``fedmq rollback`` does it once.
    """
    if len([moment for moment in ousted if moment > time.monotonic() - RIVAL_SECONDS]) > RIVAL_TIMES:
        raise StaleEpoch(
            f"an aggregator that uses another broker (or virtual host) works in {folder} as well: both would undo "
            "each other's work. Give each run its own folder, and its aggregators one broker.url"
        )


def main() -> None:
    """``python -m aggregator``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(aggregator)
    app(prog_name="python -m aggregator")
