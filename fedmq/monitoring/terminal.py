"""A snapshot as a terminal shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from broker.messages import Role
from fedmq.monitoring.monitor import Monitor

__all__ = ["Display", "render"]

STYLES = {"silent": "red", "quarantine": "red", "left": "dim", "away": "dim"}


def render(snapshot: Mapping[str, Any], *, title: str, footer: str = "") -> RenderableType:
    """``snapshot`` in a panel. No text in it is read as markup."""
    parts: list[RenderableType] = [_head(snapshot), Text(), _table(snapshot["workers"])]
    if footer:
        parts += [Text(), Text(footer, style="dim")]
    return Panel(Group(*parts), title=Text(title, overflow="ellipsis", no_wrap=True), padding=(1, 2))


def _head(snapshot: Mapping[str, Any]) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(no_wrap=True)
    grid.add_column(ratio=1)
    version, rounds = snapshot["version"], snapshot["rounds"]
    grid.add_row(
        "round", f"{version}" + (f" of {rounds}" if rounds else ""), Bar(rounds or max(version, 1), 0, version)
    )
    fill, goal = snapshot["buffer"]["fill"], snapshot["buffer"]["goal"]
    grid.add_row("buffer", f"{fill} of {goal}" if goal else "-", Bar(max(goal, 1), 0, fill))
    stale = snapshot["staleness"]
    shown = f"median {stale['median']:g}, largest {stale['max']:g}" if stale["median"] is not None else "-"
    grid.add_row("staleness", shown, "")
    grid.add_row("training loss", _figure(snapshot["loss"]), "")
    metrics = snapshot["evaluation"]["metrics"]
    figures = ", ".join(f"{name} {'no number' if value is None else f'{value:.4f}'}" for name, value in metrics.items())
    accuracy = metrics.get("accuracy") or 0.0
    grid.add_row(
        "held-out",
        Text(f"{figures} (version {snapshot['evaluation']['version']})" if figures else "-"),
        Bar(1.0, 0, accuracy if math.isfinite(accuracy) else 0.0),
    )
    if rejected := snapshot["rejected"]:
        ordered = sorted(rejected.items(), key=lambda pair: -pair[1])
        grid.add_row("rejected", Text(", ".join(f"{n} {reason}" for reason, n in ordered)), "")
    return grid


def _table(workers: list[Mapping[str, Any]]) -> RenderableType:
    table = Table(box=None, pad_edge=False, header_style="bold")
    # A name may have 64 letters. Only this column may shrink, and its texts are cut instead of wrapped.
    table.add_column("worker")
    table.add_column("state", no_wrap=True)
    for name in ("version", "updates", "loss", "s/update", "staleness"):
        table.add_column(name, justify="right", no_wrap=True)
    for worker in workers:
        never = worker["seen_seconds"] is None
        updates = worker["sent"] if worker["updates"] is None else worker["updates"]
        table.add_row(
            Text(worker["name"], overflow="ellipsis", no_wrap=True),
            Text(worker["state"] or "-", style="dim" if never else STYLES.get(worker["state"], "")),
            "-" if worker["version"] is None else str(worker["version"]),
            "-" if worker["role"] == Role.EVALUATOR else str(updates or 0),
            _figure(worker["loss"]),
            _figure(worker["seconds"], 2),
            _figure(worker["staleness"], 1),
        )
    return table


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


class Display:
    """Shows a run until it is left: live on a terminal, one line a round elsewhere."""

    def __init__(self, monitor: Monitor, console: Console, *, title: str, footer: str = "") -> None:
        """See the class."""
        self._monitor = monitor
        self._console = console
        self._title, self._footer = title, footer
        self._live: Live | None = None
        self._told = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(get_renderable=self._render, console=self._console, refresh_per_second=5)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.refresh()
        if self._live is not None:
            self._live.stop()

    def refresh(self) -> None:
        """Print what is new, where there is no live display."""
        if self._live is not None:
            return
        for entry in self._monitor.log(self._told):
            self._told = entry.number
            if entry.kind == "version":
                self._console.print(entry.text, markup=False, highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        return render(self._monitor.snapshot(), title=self._title, footer=self._footer)
