"""``fedmq``: one command for everything."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as Grid

from aggregator.checkpoint import CheckpointStore
from aggregator.checkpoints import app as checkpoint_app
from aggregator.cli import FolderOption, aggregator, checkpoint_folder
from aggregator.config import AggregatorConfig
from broker.cli import app as broker_app
from broker.console import (
    BrokerOption,
    ConfigOption,
    JsonOption,
    RunOption,
    SetOption,
    VerboseOption,
    guard,
    parse_flags,
    say_table,
    set_up_logging,
)
from broker.dead import app as dead_app
from broker.errors import CheckpointError, TaskError
from broker.settings import Settings, Table, load, plain
from fedmq.compress import register as register_compress
from fedmq.contribution import register as register_contribution
from fedmq.control import register as register_controls
from fedmq.lineage import register as register_lineage
from fedmq.simulate import register as register_simulate
from fedmq.workers import register as register_workers
from worker_client.cli import TaskOption, evaluate, worker
from worker_client.config import WorkerConfig

__all__ = ["app", "config", "demo", "init", "main"]

app = typer.Typer(
    help="Asynchronous federated learning over RabbitMQ: nothing lost, nothing counted twice.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
out = Console()

KINDS: dict[str, type[Table]] = {"aggregator": AggregatorConfig, "worker": WorkerConfig}


def _version(wanted: bool) -> None:
    if wanted:
        try:
            known = version("fedmq")
        except PackageNotFoundError:
            known = "(not installed; run from its source)"
        out.print(f"fedmq {known}", highlight=False)
        raise typer.Exit


@app.callback()
def _main(
    *,
    version_: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="The version.")] = False,
) -> None:
    del version_


@app.command()
def demo(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    workers: Annotated[int | None, typer.Option("--workers", help="Training processes.")] = None,
    rounds: Annotated[int | None, typer.Option("--rounds", help="Rounds until the run is done.")] = None,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Train on handwritten digits: an aggregator, an evaluator and four workers on this machine.

    The data is split unevenly; one worker is slow and one joins late. Uses a private RabbitMQ node, or the one
    that --broker names, or an in-process broker where neither can be had. Ctrl-C ends everything.
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
            aggregator__stop_after_rounds=rounds,
        )
        demonstration.demo(demonstration.demo_settings(config, flags), Console())


@app.command()
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
        read = load(KINDS, file=config, flags=flags)
        if _is_initialised(read, exist_ok=exist_ok):
            return
        _require_torch()
        from fedmq.initialise import initialise  # noqa: PLC0415 (needs torch)

        snapshot = initialise(read)
        size = sum(array.size for array in snapshot.parameters.values())
        count = len(snapshot.parameters)
        where = checkpoint_folder(read)
        out.print(f"run {read.run!r}: {size:,} numbers in {count} tensors, in {where}", highlight=False, soft_wrap=True)


def _is_initialised(read: Settings, *, exist_ok: bool) -> bool:
    """Raises :class:`CheckpointError` if the run's folder holds what must not be touched, or not be relied on."""
    store = CheckpointStore(checkpoint_folder(read), read.run)
    if not store.files():
        return False
    store.load()
    text = f"run {read.run!r} has been initialised: {store.folder}"
    if not exist_ok:
        raise CheckpointError(f"{text}; 'fedmq aggregator' goes on with it, or choose another --run or --folder")
    out.print(text, highlight=False, soft_wrap=True)
    return True


@app.command()
def config(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    settings: SetOption = None,
    json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Show the settings in force, and where each one was set.

    Example: fedmq config --set worker.batch_size=64
    """
    with guard():
        set_up_logging(verbose)
        read = load(KINDS, file=config, flags=parse_flags(settings or [], run=run, broker__url=broker))
        rows = _rows(read)
        if json:
            out.print_json(data=[{"key": key, "value": value, "from": origin} for key, value, origin in rows])
            return
        table = Grid(box=None, pad_edge=False, header_style="bold")
        table.add_column("setting", no_wrap=True)
        for name in ("value", "from"):
            table.add_column(name, overflow="fold")
        for key, value, origin in rows:
            table.add_row(key, "-" if value is None else str(value), origin)
        say_table(table)


def _rows(read: Settings) -> list[tuple[str, object, str]]:
    shown = plain(read)
    rows: list[tuple[str, object, str]] = [("run", read.run, str(read.origin("run")))]
    for name, table in read.tables.items():
        keys = type(table).model_fields
        rows += [(f"{name}.{key}", shown[name].get(key), str(read.origin(f"{name}.{key}"))) for key in keys]
    return rows


def _require_torch() -> None:
    """Only the aggregator does without."""
    try:
        import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TaskError('this command needs torch: pip install "fedmq[torch]"') from None


app.command("aggregator")(aggregator)
app.command("worker")(worker)
app.command("evaluate")(evaluate)
register_controls(app)
register_lineage(app)
register_compress(app)
register_contribution(app)
register_workers(app)
register_simulate(app)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(dead_app, name="dead")
app.add_typer(broker_app, name="broker")


def main() -> None:
    """The console script."""
    app(prog_name="fedmq")


if __name__ == "__main__":
    main()
