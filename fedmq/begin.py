"""``fedmq demo | init``: how a run begins."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer
from rich.console import Console

from aggregator.checkpoint import CheckpointStore
from aggregator.cli import FolderOption, checkpoint_folder
from aggregator.config import AggregatorConfig
from broker.console import (
    BrokerOption,
    ConfigOption,
    RunOption,
    SetOption,
    VerboseOption,
    bar,
    guard,
    parse_flags,
    say,
    set_up_logging,
)
from broker.errors import CheckpointError, TaskError
from broker.settings import Settings, load
from worker_client.cli import TaskOption
from worker_client.config import WorkerConfig

__all__ = ["demo", "init"]


def demo(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Training processes.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Rounds until the run is done.")] = None,
    dashboard: Annotated[
        bool | None, typer.Option("--dashboard/--no-dashboard", help="Serve the live page.", show_default="on")
    ] = None,
    trouble: Annotated[
        bool | None,
        typer.Option("--trouble", help="One worker is killed, one slow, one sends what is no use.", show_default=False),
    ] = None,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Train on handwritten digits: an aggregator, an evaluator and four workers on this machine.

    The data is split unevenly; one worker is slow and one joins late. Uses a private RabbitMQ node, or the one
    that --broker names, or an in-process broker where neither can be had. Ctrl-C ends everything.

    Example: fedmq demo --workers 8 --rounds 20
    """
    with guard():
        # The display says what goes on; the log of each process goes to a file of its own.
        set_up_logging(verbose, quiet=not verbose)
        _require_torch()
        from fedmq import demo as demonstration  # noqa: PLC0415 (needs torch)

        flags = parse_flags(
            settings or [],
            run=run,
            broker__url=broker,
            demo__workers=workers,
            demo__dashboard=dashboard,
            demo__trouble=trouble,
            aggregator__stop_after_rounds=rounds,
        )
        demonstration.demo(demonstration.demo_settings(config, flags), Console())


def init(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    task: TaskOption = None,
    folder: FolderOption = None,
    exist_ok: Annotated[bool, typer.Option("--exist-ok", help="Succeed if the run has been initialised.")] = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Make a run's first checkpoint: version 0, with the parameters of the task's model.

    Example: fedmq init --run digits --task worker_client.tasks.digits:Digits
    """
    with guard():
        set_up_logging(verbose)
        flags = parse_flags(settings or [], run=run, worker__task=task, aggregator__folder=folder)
        read = load({"aggregator": AggregatorConfig, "worker": WorkerConfig}, file=config, flags=flags)
        if _is_initialised(read, exist_ok=exist_ok):
            return
        _require_torch()
        from fedmq.initialise import initialise  # noqa: PLC0415 (needs torch)

        with bar("making the model"):
            snapshot = initialise(read)
        size = sum(array.size for array in snapshot.parameters.values())
        count = len(snapshot.parameters)
        where = checkpoint_folder(read)
        say(f"run {read.run!r}: {size:,} numbers in {count} tensors, in {where}")


def _is_initialised(read: Settings, *, exist_ok: bool) -> bool:
    """Raises :class:`CheckpointError` if the run's folder holds what must not be touched, or not be relied on."""
    store = CheckpointStore(checkpoint_folder(read), read.run)
    if not store.files():
        return False
    store.load()
    text = f"run {read.run!r} has been initialised: {store.folder}"
    if not exist_ok:
        raise CheckpointError(f"{text}; 'fedmq aggregator' goes on with it, or choose another --run or --folder")
    say(text)
    return True


def _require_torch() -> None:
    """Only the aggregator does without."""
    try:
        import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TaskError('this command needs torch: pip install "fedmq[torch]"') from None
