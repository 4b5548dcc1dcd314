"""``fedmq simulate``: a federation in virtual time, as a scenario describes it."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table as Grid

from broker.console import (
    JsonOption,
    SetOption,
    VerboseOption,
    bar,
    guard,
    parse_flags,
    say,
    say_table,
    set_up_logging,
)
from broker.errors import ConfigError
from fedmq.simulation.figures import figures, require_matplotlib
from fedmq.simulation.report import summaries, write_report
from fedmq.simulation.run import run_with_split
from fedmq.simulation.sweep import Outcome, Sweep, load_sweep, run_cells
from fedmq.simulation.tables import write_tables

__all__ = ["simulate"]

log = logging.getLogger("fedmq.simulate")


def simulate(
    scenario: Annotated[Path, typer.Argument(metavar="SCENARIO", help="A scenario, as a TOML file.")],
    *,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", metavar="FOLDER", help="For tables and report; results/NAME for a sweep."),
    ] = None,
    trace: Annotated[
        Path | None,
        typer.Option("--trace", metavar="FOLDER", help="A run's folder: its workers train when they did there."),
    ] = None,
    jobs: Annotated[int | None, typer.Option("--jobs", "-j", min=1, help="Processes; all cores.")] = None,
    no_figures: Annotated[bool, typer.Option("--no-figures", help="Tables alone, without matplotlib.")] = False,
    settings: SetOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = 0,
) -> None:
    r"""Let a federation happen in virtual time: the real aggregation code, with workers and faults that are made up.

    With a table \[sweep], all its variants and seeds, in parallel processes. What has been computed is kept in FOLDER
    and not computed again.

    Example: fedmq simulate examples/simulation/quadratic.toml --set run.seed=1
    """
    with guard():
        set_up_logging(verbose)
        sweep = load_sweep(scenario, parse_flags(settings or [], population__trace=trace))
        if not sweep.is_sweep and out is None:
            result, _, took = run_with_split(sweep.cells[0].scenario)
            outcome = Outcome(sweep.name, result.seed, result.plain(), None, took)
            say(_as_json(outcome.result)) if as_json else _show(outcome)
            return
        folder = out or Path("results") / sweep.name
        if not no_figures:
            require_matplotlib()
        outcomes = _all(sweep, folder, jobs or os.cpu_count() or 1)
        written = write_tables(outcomes, folder)
        if not no_figures:
            report = folder / "report.html"
            text = scenario.read_text()
            pictures = figures(outcomes)
            write_report(report, title=sweep.name, outcomes=outcomes, figures=pictures, scenario=text)
            written.append(report)
        if as_json:
            rows = [{"variant": o.variant, "seed": o.seed, **o.result} for o in outcomes]
            say(_as_json(rows))
        else:
            _show_all(outcomes)
            say("written: " + ", ".join(map(str, written)))


def _as_json(plain: Any) -> str:
    """With null for what is no number: the loss of a model that diverged."""
    return json.dumps(json.loads(json.dumps(plain), parse_constant=lambda _: None), indent=2)


def _all(sweep: Sweep, folder: Path, jobs: int) -> list[Outcome]:
    """Raises the first cell's error after all others are done, which stay."""
    try:
        with _progress(len(sweep.cells)) as advance:
            outcomes, failed = run_cells(sweep, folder / "cells", jobs=jobs, done=advance)
    except OSError as error:
        raise ConfigError(f"--out {folder}: {error.strerror or error}; choose a folder that can be written") from None
    for problem in failed[1:]:
        log.error("%s", problem)
    if failed:
        raise failed[0]
    return outcomes


@contextmanager
def _progress(total: int) -> Iterator[Callable[[Outcome, bool], None]]:
    with bar("simulating", total=total, unit="cells") as shown:

        def advance(outcome: Outcome, was_there: bool) -> None:
            shown.say(shown.done + 1, what=f"simulating: {outcome.variant}, seed {outcome.seed}")
            how = "had been computed" if was_there else f"took {outcome.took:.1f} s"
            log.info("%s, seed %d: %s", outcome.variant, outcome.seed, how)

        yield advance


def _show_all(outcomes: list[Outcome]) -> None:
    rows = summaries(outcomes)
    table = Grid(box=None, pad_edge=False, header_style="bold")
    for name in rows[0]:
        table.add_column(name, justify="left" if name == "variant" else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row.values()))
    say_table(table)


def _show(outcome: Outcome) -> None:
    result = outcome.result
    rejected = ", ".join(f"{count:,} {reason}" for reason, count in result["rejected"].items())
    rows = [
        ("ended by", result["ended"]),
        ("virtual seconds", f"{result['seconds']:,.3f}"),
        ("versions", f"{result['versions']:,}"),
        ("updates that count", f"{result['updates']:,}"),
        ("rejected", rejected or "none"),
        ("bytes up, down", f"{result['bytes_up']:,}, {result['bytes_down']:,}"),
        *((name, f"{value:.6g}") for name, value in result["points"][-1]["metrics"].items()),
        ("digest", result["digest"]),
        ("took", f"{outcome.took:.1f} s, {result['events'] / max(outcome.took, 1e-9):,.0f} events/s"),
    ]
    if result["target"] is not None:
        reached = result["reached"]
        when = "never" if reached is None else f"{reached['seconds']:,.3f} s, {reached['updates']:,} updates"
        rows.insert(1, (f"{result['metric']} {result['target']:g} reached", when))
    table = Grid(box=None, pad_edge=False, show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    say_table(table)
