"""``fedmq config``: the settings in force."""

from __future__ import annotations

from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from aggregator.config import AggregatorConfig
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
from broker.settings import LogConfig, MetricsConfig, Settings, Table, load, plain
from worker_client.config import WorkerConfig

__all__ = ["config"]

KINDS: dict[str, type[Table]] = {
    "aggregator": AggregatorConfig,
    "worker": WorkerConfig,
    "metrics": MetricsConfig,
    "log": LogConfig,
}

out = Console()


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
            table.add_row(key, "-" if value is None else escape(str(value)), escape(origin))
        say_table(table)


def _rows(read: Settings) -> list[tuple[str, object, str]]:
    shown = plain(read)
    rows: list[tuple[str, object, str]] = [("run", read.run, str(read.origin("run")))]
    for name, table in read.tables.items():
        keys = type(table).model_fields
        rows += [(f"{name}.{key}", shown[name].get(key), str(read.origin(f"{name}.{key}"))) for key in keys]
    return rows
