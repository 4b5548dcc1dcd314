"""``fedmq aggregator``, also ``python -m aggregator``."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Annotated

import tomli_w
import typer

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.service import AggregatorService, Outcome
from broker.amqp.transport import AmqpAggregatorTransport
from broker.console import (
    BrokerOption,
    ConfigOption,
    RunOption,
    SetOption,
    VerboseOption,
    guard,
    parse_flags,
    set_up_logging,
    stop_on_signals,
)
from broker.errors import CheckpointNotWritten
from broker.settings import Settings, load, plain
from broker.topology import Topology

__all__ = ["aggregator", "checkpoint_folder", "main", "run_folder", "serve"]

FolderOption = Annotated[Path | None, typer.Option("--folder", help="Where checkpoints are kept; runs/<run>.")]


def aggregator(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    folder: FolderOption = None,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Buffer updates, apply them, make them durable, broadcast new versions, until the run is done.

    Goes on where the run's newest checkpoint stands. SIGTERM commits what is folded and exits 0; updates that
    are not in a checkpoint go back to the queue.

    Example: fedmq aggregator --run digits --set aggregator.buffer_size=4
    """
    with guard():
        set_up_logging(verbose)
        flags = parse_flags(settings or [], run=run, broker__url=broker, aggregator__folder=folder)
        serve(load({"aggregator": AggregatorConfig}, file=config, flags=flags))


def run_folder(settings: Settings) -> Path:
    """The folder of the run's results."""
    return settings.table("aggregator", AggregatorConfig).folder or Path("runs") / settings.run


def checkpoint_folder(settings: Settings) -> Path:
    """The folder of the run's checkpoints."""
    return run_folder(settings) / "checkpoints"


def serve(settings: Settings) -> Outcome:
    """Run the aggregator that ``settings`` describe until it is done or a signal comes."""
    config = settings.table("aggregator", AggregatorConfig)
    folder = run_folder(settings)
    store = CheckpointStore(checkpoint_folder(settings), settings.run)
    snapshot = store.claim()
    size = snapshot.model.nbytes
    try:
        (folder / "config.toml").write_text(tomli_w.dumps(plain(settings)))
    except OSError as error:
        raise CheckpointNotWritten(f"{folder}: {error.strerror}; make the folder writable") from None
    service = AggregatorService(
        folder=folder, run=settings.run, rules=config.rules(size), store=store, snapshot=snapshot
    )
    transport = AmqpAggregatorTransport(
        settings.broker,
        Topology(settings.run),
        model_bytes=size,
        prefetch=config.prefetch(size),
        consumer_tag=f"aggregator/epoch {snapshot.epoch}",
    )
    with stop_on_signals(threading.Event(), also=service.stop):
        return service.run(transport)


def main() -> None:
    """``python -m aggregator``."""
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(aggregator)
    app(prog_name="python -m aggregator")
