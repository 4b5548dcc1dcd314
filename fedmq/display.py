"""A run, live in the terminal: from the events that the aggregator, the workers and the evaluator publish."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from rich.bar import Bar
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from broker.errors import WireError
from broker.messages import Event, EventKind, Role, evaluation_metrics
from broker.transport import Delivery, Incoming
from broker.wire import decode

__all__ = ["Board", "Display"]

SILENT_SECONDS = 10.0


@dataclass(slots=True)
class Line:
    """What is known of one worker."""

    state: str = ""
    version: int = -1
    confirmed: int = 0
    loss: float | None = None
    seconds: float | None = None
    staleness: deque[int] = field(default_factory=lambda: deque(maxlen=50))
    seen: float | None = None
    """When it was last heard; None if never."""
    role: str = Role.TRAINER.value


class Board:
    """What the events add up to. ``take`` may be called from any thread."""

    def __init__(self) -> None:
        """Empty."""
        self.version = 0
        self.loss: float | None = None
        self.metrics: dict[str, float] = {}
        self.evaluated = -1
        self.fill = self.goal = 0
        self.staleness: deque[int] = deque(maxlen=100)
        self.rejected: Counter[str] = Counter()
        self.workers: dict[str, Line] = {}
        self.versions: deque[str] = deque(maxlen=1000)
        self._lock = threading.Lock()

    def expect(self, worker: str, state: str) -> None:
        """Show ``worker`` with ``state`` until it is heard of."""
        with self._lock:
            line = self.workers.setdefault(worker, Line())
            if line.seen is None:
                line.state = state

    def take(self, item: Incoming) -> None:
        """A sink for deliveries; whatever is no event is passed over."""
        if not isinstance(item, Delivery):
            return
        try:
            event = decode(item.body)
        except WireError:
            return
        if isinstance(event, Event):
            with self._lock:
                self._add(event)

    def _add(self, event: Event) -> None:
        data = event.data
        if event.kind is EventKind.HEARTBEAT:
            line = self.workers.setdefault(event.source, Line())
            line.seen = time.monotonic()
            line.state = str(data.get("state", ""))
            line.role = str(data.get("role", line.role))
            line.version = _whole(data.get("version"), line.version)
            line.confirmed = _whole(data.get("confirmed"), line.confirmed)
            # None before the first training, and where a loss is no number any more; not the one before, then.
            line.loss = _real(data.get("loss"), None)
            line.seconds = _real(data.get("seconds"), None) or None
        elif event.kind is EventKind.EVALUATION:
            version = _whole(data.get("version"), -1)
            if version >= self.evaluated:
                self.evaluated = version
                self.metrics = evaluation_metrics(event)
        elif event.kind is EventKind.PROGRESS:
            self._progress(event)

    def _progress(self, event: Event) -> None:
        data = event.data
        what = data.get("what")
        self.version = max(self.version, _whole(data.get("version"), 0))
        if what == "folded":
            self.fill, self.goal = _whole(data.get("fill"), 0), _whole(data.get("goal"), 0)
            for worker, staleness in _pairs(data.get("staleness")):
                self.staleness.append(staleness)
                self.workers.setdefault(worker, Line()).staleness.append(staleness)
        elif what == "version":
            self.loss = _real(data.get("loss"), None)
            self.fill = 0
            loss = "unknown" if self.loss is None else f"{self.loss:.4f}"
            stale = f"staleness {sum(self.staleness) / max(1, len(self.staleness)):.1f}"
            figures = ", ".join(f"{name} {value:.4f}" for name, value in sorted(self.metrics.items()))
            shown = f"; version {self.evaluated} held out: {figures}" if figures else ""
            self.versions.append(f"round {self.version}: training loss {loss}, {stale}{shown}")
        elif what == "rejected":
            self.rejected[str(data.get("reason"))] += 1

    def render(self, title: str, rounds: int | None, footer: str) -> RenderableType:
        """The board as rich draws it."""
        with self._lock:
            parts: list[RenderableType] = [self._head(rounds), Text(), self._table()]
            if footer:
                parts += [Text(), Text(footer, style="dim")]
            return Panel(Group(*parts), title=Text(title, overflow="ellipsis", no_wrap=True), padding=(1, 2))

    def _head(self, rounds: int | None) -> RenderableType:
        grid = Table.grid(padding=(0, 2))
        grid.add_column(style="bold", no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_column(ratio=1)
        total = rounds or max(self.version, 1)
        grid.add_row("round", f"{self.version}" + (f" of {rounds}" if rounds else ""), Bar(total, 0, self.version))
        buffer = f"{self.fill} of {self.goal}" if self.goal else "-"
        grid.add_row("buffer", buffer, Bar(max(self.goal, 1), 0, self.fill))
        stale = sorted(self.staleness)
        middle = f"median {stale[len(stale) // 2]}, largest {stale[-1]}" if stale else "-"
        grid.add_row("staleness", middle, "")
        grid.add_row("training loss", "-" if self.loss is None else f"{self.loss:.4f}", "")
        accuracy = self.metrics.get("accuracy", 0.0)
        figures = ", ".join(f"{name} {value:.4f}" for name, value in sorted(self.metrics.items()))
        grid.add_row(
            "held-out",
            f"{figures} (version {self.evaluated})" if figures else "-",
            Bar(1.0, 0, accuracy if math.isfinite(accuracy) else 0.0),
        )
        if self.rejected:
            grid.add_row("rejected", ", ".join(f"{n} {reason}" for reason, n in self.rejected.most_common()), "")
        return grid

    def _table(self) -> RenderableType:
        table = Table(box=None, pad_edge=False, header_style="bold")
        # A name may have 64 letters. Only this column may shrink, and its texts are cut instead of wrapped.
        table.add_column("worker")
        table.add_column("state", no_wrap=True)
        for name in ("version", "updates", "loss", "s/update", "staleness"):
            table.add_column(name, justify="right", no_wrap=True)
        now = time.monotonic()
        for name, line in sorted(self.workers.items()):
            silent = line.seen is not None and now - line.seen > SILENT_SECONDS
            style = "red" if silent else "dim" if line.seen is None else ""
            table.add_row(
                Text(name, overflow="ellipsis", no_wrap=True),
                Text("silent" if silent else line.state or "-", style=style),
                str(line.version) if line.version >= 0 else "-",
                "-" if line.role == Role.EVALUATOR else str(line.confirmed),
                "-" if line.loss is None else f"{line.loss:.4f}",
                "-" if line.seconds is None else f"{line.seconds:.2f}",
                f"{sum(line.staleness) / len(line.staleness):.1f}" if line.staleness else "-",
            )
        return table


class Display:
    """Shows a board until it is left: live on a terminal, one line a round elsewhere."""

    def __init__(self, board: Board, console: Console, *, title: str, rounds: int | None, footer: str = "") -> None:
        """See the class."""
        self._board = board
        self._console = console
        self._title, self._rounds, self._footer = title, rounds, footer
        self._live: Live | None = None

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
        if self._live is None:
            while self._board.versions:
                self._console.print(self._board.versions.popleft(), highlight=False, soft_wrap=True)

    def _render(self) -> RenderableType:
        return self._board.render(self._title, self._rounds, self._footer)


def _pairs(text: object) -> Iterator[tuple[str, int]]:
    """Of ``w0:3 w1:0``, the names and numbers."""
    for part in str(text).split():
        name, _, number = part.partition(":")
        if number.isdecimal():
            yield name, int(number)


def _whole(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _real(value: object, default: float | None) -> float | None:
    return float(value) if isinstance(value, int | float) else default
