"""``fedmq report``: a run on one page of HTML."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from aggregator.checkpoint import CheckpointStore
from aggregator.checkpoints import require_some
from aggregator.cli import FolderOption, checkpoint_folder, run_folder
from aggregator.config import AggregatorConfig
from aggregator.report import write_report
from broker.console import (
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
from broker.settings import load

__all__ = ["report"]


def report(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    folder: FolderOption = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The page; report.html in the run's folder, if not given.")
    ] = None,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Tell of a run on one page of HTML, with figures: loss, metrics, staleness, workers, lineage, settings.

    From the run's folder, whether the run is over or goes on. The aggregator makes the same page at the end of a run.

    Example: fedmq report --run digits
    """
    with guard():
        set_up_logging(verbose, quiet=not verbose)
        flags = parse_flags(settings or [], run=run, aggregator__folder=folder)
        read = load({"aggregator": AggregatorConfig}, file=config, flags=flags)
        store = CheckpointStore(checkpoint_folder(read), read.run)
        require_some(read, store)
        with bar("reading the history"):
            written = write_report(run_folder(read), store, output)
        say(f"written to {written}")
