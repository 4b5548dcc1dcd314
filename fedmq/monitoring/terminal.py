"""A snapshot as a terminal shows it: in few lines for the demonstration, and all of it for ``fedmq status``."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
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

__all__ = ["Display", "details", "render"]

STATES = {"silent": "bold red", "quarantine": "bold red", "left": "dim", "away": "dim"}
RUNS = {"running": "green", "done": "green", "paused": "yellow", "silent": "bold red", "waiting": "yellow"}

Snapshot = Mapping[str, Any]


def render(snapshot: Snapshot, *, title: str, footer: str = "") -> RenderableType:
    """``snapshot`` in a panel of few lines. No text in it is read as markup."""
    head = _grid(wraps=False)
    for name, text, bar in (_round(snapshot), _buffer(snapshot), *_figures(snapshot)):
        head.add_row(name, text, bar)
    if snapshot["rejected"]:
        head.add_row("rejected", _reasons(snapshot["rejected"]), "")
    parts: list[RenderableType] = [head, Text(), _few(snapshot["workers"])]
    if footer:
        parts += [Text(), Text(footer, style="dim")]
    return Panel(Group(*parts), title=Text(title, overflow="ellipsis", no_wrap=True), padding=(1, 2))


def details(snapshot: Snapshot, *, most: int | None = None) -> RenderableType:
    """All that is known. Workers with remarks come first; beyond ``most`` they are counted only."""
    head = _grid(wraps=True)
    head.add_row("run", Text.assemble(snapshot["run"], ", ", (snapshot["state"], RUNS.get(snapshot["state"], ""))))
    head.add_row("aggregator", _aggregators(snapshot["aggregators"]))
    rows = [_round(snapshot), _buffer(snapshot), ("rates", _rates(snapshot["rates"]), ""), *_figures(snapshot)]
    for name, text, _ in rows:
        head.add_row(name, text)
    head.add_row("updates", _updates(snapshot))
    if snapshot["rejected"]:
        head.add_row("rejected", _reasons(snapshot["rejected"]))
    head.add_row("disk", Text(_disk(snapshot["disk"])))
    if (alarms := snapshot["alarms"]) is not None:
        shown = Text("\n".join(alarms), style="bold red") if alarms else Text("none", style="green")
        head.add_row("alarms", shown)
    parts: list[RenderableType] = [head, Text(), _workers(snapshot["workers"], most)]
    if snapshot["queues"]:
        parts += [Text(), _queues(snapshot["queues"])]
    if snapshot["missing"]:
        parts += [Text(), Text("\n".join(f"not known: {text}" for text in snapshot["missing"]), style="dim")]
    return Group(*parts)


# ------------------------------------------------------------------------------------------------ the head


def _grid(*, wraps: bool) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True)
    grid.add_column(no_wrap=not wraps)
    if not wraps:
        grid.add_column(ratio=1)
    return grid


Row = tuple[str, Text, RenderableType]


def _round(snapshot: Snapshot) -> Row:
    version, rounds = snapshot["version"], snapshot["rounds"]
    text = f"{version}" + (f" of {rounds}" if rounds else "")
    return "round", Text(text), Bar(rounds or max(version, 1), 0, version)


def _buffer(snapshot: Snapshot) -> Row:
    fill, goal = snapshot["buffer"]["fill"], snapshot["buffer"]["goal"]
    return "buffer", Text(f"{fill} of {goal}" if goal else "-"), Bar(max(goal, 1), 0, fill)


def _figures(snapshot: Snapshot) -> list[Row]:
    stale, evaluation = snapshot["staleness"], snapshot["evaluation"]
    shown = "-"
    if stale["median"] is not None:
        shown = f"median {stale['median']:g}, p95 {stale['p95']:g}, largest {stale['max']:g}"
    metrics = evaluation["metrics"]
    figures = ", ".join(f"{name} {'no number' if value is None else f'{value:.4f}'}" for name, value in metrics.items())
    return [
        ("staleness", Text(shown), ""),
        ("training loss", Text(_figure(snapshot["loss"])), ""),
        (
            "held-out",
            Text(f"{figures} (version {evaluation['version']})" if figures else "-"),
            Bar(1.0, 0, metrics.get("accuracy") or 0.0),
        ),
    ]


def _aggregators(aggregators: Sequence[Snapshot]) -> Text:
    shown = []
    for one in aggregators:
        role = f"active, epoch {one['epoch']}" if one["epoch"] is not None else "active"
        shown.append(f"{one['name']} ({role if one['active'] else 'stands by'})")
    return Text("\n".join(shown) if shown else "none is heard")


def _rates(rates: Snapshot) -> Text:
    if rates["rounds_per_minute"] is None:
        return Text("-")
    return Text(
        f"{rates['rounds_per_minute']:.3g} rounds a minute, {rates['updates_per_second'] or 0:.3g} updates a second"
    )


def _updates(snapshot: Snapshot) -> Text:
    dead, applied = snapshot["dead_letters"], snapshot["updates"]
    text = f"{'-' if applied is None else applied} applied, {sum(snapshot['rejected'].values())} rejected"
    return Text(text + ("" if dead is None else f"; {dead} in the dead letters"))


def _reasons(rejected: Mapping[str, int]) -> Text:
    ordered = sorted(rejected.items(), key=lambda pair: (-pair[1], pair[0]))
    return Text(", ".join(f"{n} {reason}" for reason, n in ordered))


def _disk(disk: Snapshot) -> str:
    if disk["bytes"] is None:
        return "-"
    text = f"{disk['checkpoints']} checkpoints, {_size(disk['bytes'])}"
    return text + (f"; {_size(disk['free'])} of {_size(disk['total'])} free" if disk["free"] is not None else "")


# ---------------------------------------------------------------------------------------------- the tables


def _few(workers: Sequence[Snapshot]) -> Table:
    # A name may have 64 letters. Only its column may shrink, and its texts are cut instead of wrapped.
    table = _table({"worker": "left", "state": "left"}, ("version", "updates", "loss", "s/update", "staleness"))
    for worker in workers:
        table.add_row(
            _name(worker),
            _state(worker),
            "-" if worker["version"] is None else str(worker["version"]),
            _counted(worker),
            _figure(worker["loss"]),
            _figure(worker["seconds"], 2),
            _figure(worker["staleness"], 1),
        )
    return table


def _workers(workers: Sequence[Snapshot], most: int | None) -> RenderableType:
    numbers = ("heard", "version", "updates", "s/update", "staleness", "loss", "rejected")
    table = _table({"worker": "left", "state": "left"}, numbers)
    table.add_column("remarks")
    ordered = sorted(workers, key=lambda worker: (not worker["remarks"], worker["name"]))
    for worker in ordered[:most]:
        table.add_row(
            _name(worker),
            _state(worker),
            "-" if worker["seen_seconds"] is None else f"{worker['seen_seconds']:.0f} s",
            "-" if worker["version"] is None else str(worker["version"]),
            _counted(worker),
            _figure(worker["seconds"], 2),
            _figure(worker["staleness"], 1),
            _figure(worker["loss"]),
            str(sum(worker["rejected"].values()) or ""),
            Text("; ".join(worker["remarks"]), style="" if worker["state"] == "left" else "yellow"),
        )
    if most is None or len(ordered) <= most:
        return table
    return Group(table, Text(f"… and {len(ordered) - most} more", style="dim"))


def _queues(queues: Sequence[Snapshot]) -> Table:
    table = _table({"queue": "left", "of": "left"}, ("ready", "unacked", "size", "consumers"))
    for queue in queues:
        numbers = [queue["ready"], queue["unacked"], queue["bytes"], queue["consumers"]]
        shown = ["-" if number is None else str(number) for number in numbers]
        shown[2] = "-" if queue["bytes"] is None else _size(queue["bytes"])
        table.add_row(_name(queue), Text(queue["purpose"]), *shown)
    return table


def _table(texts: Mapping[str, Any], numbers: Collection[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index, (name, justify) in enumerate(texts.items()):
        table.add_column(name, justify=justify, no_wrap=index > 0)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _name(one: Snapshot) -> Text:
    return Text(one["name"], overflow="ellipsis", no_wrap=True)


def _state(worker: Snapshot) -> Text:
    return Text(
        worker["state"] or "-", style="dim" if worker["seen_seconds"] is None else STATES.get(worker["state"], "")
    )


def _counted(worker: Snapshot) -> str:
    if worker["role"] == Role.EVALUATOR:
        return "-"
    return str((worker["sent"] if worker["updates"] is None else worker["updates"]) or 0)


def _figure(value: float | None, digits: int = 4) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _size(nbytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if nbytes < 1000:
            return f"{nbytes:.3g} {unit}"
        nbytes /= 1000
    return f"{nbytes:,.1f} TB"


# --------------------------------------------------------------------------------------------- the display


class Display:
    """Shows a run until it is left: live on a terminal, a line for each thing that happens elsewhere."""

    def __init__(
        self,
        monitor: Monitor,
        console: Console,
        draw: Callable[[Snapshot], RenderableType],
        *,
        kinds: Collection[str] = (),
    ) -> None:
        """``draw`` makes the picture; ``kinds``: which lines of the log are printed, all if it is empty."""
        self._monitor = monitor
        self._console = console
        self._draw = draw
        self._kinds = kinds
        self._live: Live | None = None
        self._told = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(
                get_renderable=lambda: self._draw(self._monitor.snapshot()), console=self._console, refresh_per_second=5
            )
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
            if not self._kinds or entry.kind in self._kinds:
                self._console.print(entry.text, markup=False, highlight=False, soft_wrap=True)
