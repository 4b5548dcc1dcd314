"""``fedmq simulate``: a federation in virtual time, as a scenario describes it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table as Grid

from broker.console import JsonOption, SetOption, VerboseOption, guard, parse_flags, say, say_table, set_up_logging
from fedmq.simulation.record import Result
from fedmq.simulation.run import simulate as simulate_scenario
from fedmq.simulation.scenario import load_scenario

__all__ = ["register", "simulate"]


def simulate(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="A scenario, as a TOML file.")],
    *,
    settings: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    """Let a federation happen in virtual time: the real aggregation code, with workers and faults that are made up.

    Example: fedmq simulate examples/simulation/quadratic.toml --set run.seed=1
    """
    with guard():
        set_up_logging(verbose)
        read = load_scenario(scenario, parse_flags(settings or []))
        started = time.monotonic()
        result = simulate_scenario(read)
        took = time.monotonic() - started
        if as_json:
            say(json.dumps(result.plain(), indent=2, allow_nan=False))
        else:
            _show(result, took)


def register(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command()(simulate)


def _show(result: Result, took: float) -> None:
    last = result.points[-1]
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in sorted(result.rejected.items()))
    rows = [
        ("ended by", result.ended),
        ("virtual seconds", f"{result.seconds:,.3f}"),
        ("versions", f"{result.versions:,}"),
        ("updates that count", f"{result.updates:,}"),
        ("rejected", rejected or "none"),
        ("bytes up, down", f"{result.bytes_up:,}, {result.bytes_down:,}"),
        *((name, f"{value:.6g}") for name, value in last.metrics.items()),
        ("digest", result.digest),
        ("took", f"{took:.1f} s, {result.events / max(took, 1e-9):,.0f} events/s"),
    ]
    if result.target is not None:
        reached = result.reached
        when = "never" if reached is None else f"{reached.seconds:,.3f} s, {reached.updates:,} updates"
        rows.insert(1, (f"{result.metric} {result.target:g} reached", when))
    table = Grid(box=None, pad_edge=False, show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for row in rows:
        table.add_row(*row)
    say_table(table)
