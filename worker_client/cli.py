"""``python -m worker_client`` and ``fedmq worker``, ``fedmq evaluate``: one worker as a process."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from broker.amqp.transport import AmqpWorkerTransport
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
from broker.errors import TaskError
from broker.logs import describe
from broker.messages import Role
from broker.settings import LogConfig, MetricsConfig, Settings, Table, load
from broker.topology import Topology
from broker.tracing import tracer_for
from worker_client.config import WorkerConfig
from worker_client.meter import Meter, Meters

if TYPE_CHECKING:  # torch comes with it
    from worker_client.session import Summary

__all__ = ["app", "evaluate", "main", "metered", "worker"]

log = logging.getLogger("fedmq.worker")

NameOption = Annotated[str | None, typer.Option("--name", help="This worker's name; the host's, if not given.")]
TaskOption = Annotated[str | None, typer.Option("--task", help="What to train: package.module:attribute.")]
ShardOption = Annotated[str | None, typer.Option("--shard", help="Which part of the data: 0/4, or auto/4.")]
FolderOption = Annotated[Path | None, typer.Option("--folder", help="Where the worker keeps its identity.")]


def worker(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    name: NameOption = None,
    task: TaskOption = None,
    shard: ShardOption = None,
    folder: FolderOption = None,
    settings: SetOption = None,
    log_format: LogFormatOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Train on this machine's data for a run, until the run is over or SIGTERM.

    Example: fedmq worker --run digits --name w1 --shard 0/4 --task worker_client.tasks.digits:Digits
    """
    with guard():
        service_logging(verbose, log_format)
        own_options = {"name": name, "task": task, "shard": shard, "folder": folder}
        read = _load(config, settings, run=run, broker=broker, log_format=log_format, **own_options)
        service_logging(verbose, read.table("log", LogConfig).format)
        own = read.table("worker", WorkerConfig)
        if own.folder is None:
            own = own.model_copy(update={"folder": Path("runs") / read.run / "workers" / own.name})
        _live(read, own, evaluator=False)


def evaluate(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    name: NameOption = None,
    task: TaskOption = None,
    settings: SetOption = None,
    log_format: LogFormatOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Evaluate each version of a run on the task's held-out data, until the run is over or SIGTERM.

    Example: fedmq evaluate --run digits --task worker_client.tasks.digits:Digits
    """
    with guard():
        service_logging(verbose, log_format)
        read = _load(config, settings, run=run, broker=broker, log_format=log_format, name=name, task=task)
        service_logging(verbose, read.table("log", LogConfig).format)
        own = read.table("worker", WorkerConfig)
        if read.origin("worker.name").kind == "default":
            # A worker on the same host has the host's name already.
            own = own.model_copy(update={"name": f"{own.name[:54]}-evaluator"})
        if own.folder is None and own.aggregator_keys_file is not None:
            # It must not forget which version it has believed last.
            own = own.model_copy(update={"folder": Path("runs") / read.run / "workers" / own.name})
        _live(read, own, evaluator=True)


def _load(
    config: Path | None,
    pairs: list[str] | None,
    *,
    run: str | None,
    broker: str | None,
    log_format: str | None,
    **own: Any,
) -> Settings:
    named = {f"worker__{key}": value for key, value in own.items()}
    flags = parse_flags(pairs or [], run=run, broker__url=broker, log__format=log_format, **named)
    kinds: dict[str, type[Table]] = {"worker": WorkerConfig, "metrics": MetricsConfig, "log": LogConfig}
    return load(kinds, file=config, flags=flags)


def _live(settings: Settings, config: WorkerConfig, *, evaluator: bool) -> None:
    describe(role="evaluator" if evaluator else "worker", run=settings.run, worker=config.name)
    if settings.origin("worker.task").kind == "default":
        log.info("no task is given (--task, worker.task); taking the example %s", config.task)
    try:
        # Here, because the command line must also start where torch is not installed: the aggregator's image.
        from worker_client.client import run_evaluator, run_worker  # noqa: PLC0415
        from worker_client.loading import load_task  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TaskError('a worker needs torch: pip install "fedmq[torch]"') from None
    task = load_task(config.task)
    live: Callable[..., Summary] = run_evaluator if evaluator else run_worker
    stop = threading.Event()
    role = Role.EVALUATOR if evaluator else Role.TRAINER
    who = "evaluator" if evaluator else "worker"
    transport = AmqpWorkerTransport(settings.broker, Topology(settings.run), worker=config.name, role=who)
    with (
        stop_on_signals(stop),
        metered(settings, config.name, role, transport) as counted,
        _traced(settings.run, config.name, role, counted) as meter,
    ):
        sizes = {"chunk_bytes": settings.broker.chunk_bytes, "pack_chunks": settings.broker.pack_chunks}
        summary = live(config, settings.run, transport, task, stop=stop, meter=meter, **sizes)
    version = f"newest version {summary.version}" if summary.version >= 0 else "no version yet"
    log.info("%s: %d updates confirmed, %s", summary.reason, summary.confirmed, version)


@contextlib.contextmanager
def _traced(run: str, name: str, role: Role, meter: Meter) -> Iterator[Meter]:
    """``meter``, and what makes traces if they are wanted; an evaluator has no updates to follow."""
    if role is not Role.TRAINER:
        yield meter
        return
    with tracer_for("worker", run=run, worker=name) as tracer:
        if tracer is None:
            yield meter
            return
        from worker_client.tracing import WorkerTraces  # noqa: PLC0415 (optional)

        yield Meters(meter, WorkerTraces(tracer, run, name))


@contextlib.contextmanager
def metered(settings: Settings, name: str, role: Role, transport: AmqpWorkerTransport) -> Iterator[Meter]:
    """What counts what a worker does; and if that is wanted, the figures are served within the block."""
    config = settings.table("metrics", MetricsConfig)
    if not config.port:
        yield Meter()
        return
    # Here, because whoever wants no metrics need not wait for it.
    from broker.metrics import serve  # noqa: PLC0415
    from worker_client.metrics import WorkerMetrics  # noqa: PLC0415

    metrics = WorkerMetrics(settings.run, name, role, broker=transport.state)
    with serve(config, metrics):
        yield metrics


app = typer.Typer(
    help="The worker's side of fedmq: trains on data that never leaves it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("run")(worker)
app.command("evaluate")(evaluate)


def main() -> None:
    """Run the command line."""
    app(prog_name="python -m worker_client")
