"""``fedmq status``: how a run is doing, as its aggregator, its workers and its broker tell it."""

from __future__ import annotations

import json
import threading
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from broker.console import (
    BrokerOption,
    ConfigOption,
    JsonOption,
    RunOption,
    SetOption,
    VerboseOption,
    broker_command,
    say,
    stop_on_signals,
)
from broker.errors import Unroutable
from broker.progress import errors
from broker.settings import BrokerConfig
from fedmq.monitoring.broker import TURN
from fedmq.monitoring.monitor import Monitor
from fedmq.monitoring.terminal import Display, details
from fedmq.monitoring.watching import ANSWER_SECONDS, Watching

__all__ = ["status"]

#: Longest wait for the aggregators that stand by.
STANDBY_SECONDS = 2.0
#: Longest wait for the newest version of a run without an aggregator, which it takes some to find in its stream.
STREAM_SECONDS = 10.0
#: Between two looks whether there is something new to say.
LOOK_SECONDS = 0.2
#: With --watch --json, between two lines.
JSON_SECONDS = 1.0
#: In a pipe there is no width.
PIPE_WIDTH = 200
#: Lines of a terminal that are not workers.
OTHER_LINES = 28

WatchOption = Annotated[bool, typer.Option("--watch", "-w", help="Go on until Ctrl-C.")]
WaitOption = Annotated[float, typer.Option("--wait", min=0.0, help="Seconds to wait for the aggregator's status.")]


def status(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    watch: WatchOption = False,
    wait: WaitOption = 4.0,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Show how a run is doing: rates, staleness, workers and what is wrong with them, queues, alarms, disk.

    From anywhere where the broker can be reached. What its management API does not tell is taken from AMQP; what cannot
    be known is said. With --watch live; where there is no terminal, a line for each thing that happens.

    Example: fedmq status --run digits --watch
    """
    with broker_command(config, run, broker, settings, verbose) as read, Watching(read.broker, read.run) as watching:
        watching.await_connection(_patience(read.broker))
        monitor = watching.monitor
        if watch:
            _follow(monitor, read.run, wait, as_json=as_json)
            return
        monitor.wait_complete(wait)
        watching.asked.wait(ANSWER_SECONDS)
        watching.looked.wait(ANSWER_SECONDS)
        watching.await_newest(STREAM_SECONDS)
        snapshot = _with_standbys(monitor)
        if monitor.failure is not None and not snapshot["queues"]:
            raise monitor.failure  # nothing can be known
        if monitor.is_absent:
            raise Unroutable(
                f"no aggregator has ever declared run {read.run!r} on this broker; check --run and --broker"
            )
        if as_json:
            say(json.dumps(snapshot, indent=2))
        else:
            _console().print(details(snapshot))


def _with_standbys(monitor: Monitor) -> dict[str, Any]:
    """What is known when all aggregators that wait for their turn have been heard, each of which takes a second."""
    deadline = time.monotonic() + STANDBY_SECONDS
    while True:
        snapshot = monitor.snapshot()
        waiting = [queue["consumers"] or 0 for queue in snapshot["queues"] if queue["purpose"] == TURN]
        if len(snapshot["aggregators"]) >= sum(waiting) or time.monotonic() > deadline:
            return snapshot
        time.sleep(0.05)


def _patience(config: BrokerConfig) -> float:
    return config.connect_timeout + 5


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=PIPE_WIDTH)


def _follow(monitor: Monitor, run: str, wait: float, *, as_json: bool) -> None:
    stop = threading.Event()
    console = Console()
    with stop_on_signals(stop):
        if as_json or not console.is_terminal:
            # The first line is not of a run of which nothing has been heard yet.
            monitor.wait_complete(wait)
            if monitor.is_absent:
                errors.print(f"no aggregator has declared run {run!r} yet; waiting for it", highlight=False)
        if as_json:
            while not stop.is_set():
                say(json.dumps(monitor.snapshot()))
                stop.wait(JSON_SECONDS)
            return
        rows = max(5, console.height - OTHER_LINES)
        with Display(monitor, console, lambda snapshot: details(snapshot, most=rows)) as display:
            while not stop.wait(LOOK_SECONDS):
                display.refresh()
