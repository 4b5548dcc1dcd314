"""``fedmq dashboard``: the live page of a run."""

from __future__ import annotations

import threading
import webbrowser
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from aggregator.cli import FolderOption, run_folder
from aggregator.config import AggregatorConfig
from broker.console import (
    BrokerOption,
    ConfigOption,
    RunOption,
    SetOption,
    VerboseOption,
    errors,
    guard,
    parse_flags,
    say,
    set_up_logging,
    stop_on_signals,
)
from broker.errors import ConfigError
from broker.settings import Settings, load
from fedmq.dashboard.beside import page_of, require_server
from fedmq.dashboard.config import DashboardConfig
from fedmq.monitoring.monitor import Monitor
from fedmq.monitoring.watching import watching

__all__ = ["dashboard"]


def dashboard(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    folder: FolderOption = None,
    port: Annotated[int | None, typer.Option("--port", help="Where the page is served; 0 for any free port.")] = None,
    address: Annotated[
        str | None, typer.Option("--address", help="Who can reach it; without this, only this machine.")
    ] = None,
    open_: Annotated[bool, typer.Option("--open", help="Open it in the browser.")] = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Serve a page on this machine that shows a run as it goes on: curves, workers, queues, events.

    From the run's folder it has what was before, and a run that has ended; from the broker what happens now. Either
    is enough. Ctrl-C ends it, and does nothing to the run.

    Example: fedmq dashboard --run digits --open
    """
    with guard():
        set_up_logging(verbose, quiet=not verbose)
        require_server()
        flags = parse_flags(
            settings or [],
            run=run,
            broker__url=broker,
            aggregator__folder=folder,
            dashboard__port=port,
            dashboard__address=address,
        )
        read = load({"aggregator": AggregatorConfig, "dashboard": DashboardConfig}, file=config, flags=flags)
        _serve(read, _folder(read), is_opened=open_)


def _folder(settings: Settings) -> Path | None:
    """The run's folder, if it is on this machine.

    Raises :class:`ConfigError` if it was named, and is not there.
    """
    folder = run_folder(settings)
    if folder.is_dir():
        return folder
    if "aggregator.folder" in settings.origins:
        raise ConfigError(f"{folder} is no folder: leave --folder away to see what is heard through the broker only")
    return None


def _serve(settings: Settings, folder: Path | None, *, is_opened: bool) -> None:
    config = settings.table("dashboard", DashboardConfig)
    stop = threading.Event()
    with stop_on_signals(stop), watching(settings.broker, settings.run) as monitor, ExitStack() as stack:
        with errors.status("reading the run's history"):
            url = stack.enter_context(page_of(monitor, config, folder))
        if exposure := config.exposure():
            errors.print(f"warning: {exposure}", highlight=False, style="yellow")
        say(f"run {settings.run}: {url}" + (f" (with the history in {folder})" if folder is not None else ""))
        if is_opened and not webbrowser.open(url):
            errors.print("no browser could be opened", highlight=False, style="yellow")
        _wait(stop, monitor, is_enough=folder is not None)


def _wait(stop: threading.Event, monitor: Monitor, *, is_enough: bool) -> None:
    """Until ``stop``. Without a folder, there is nothing to show once no events will come any more.

    Raises :class:`FedmqError`: why they will not.
    """
    while not stop.wait(0.2):
        if monitor.failure is not None and not is_enough:
            raise monitor.failure
