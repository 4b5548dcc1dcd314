"""Bars on the terminal for what takes long: one place for all of them, and nothing where nobody looks.

A bar appears when its work has taken a second, and is gone when it ends. Several, also of several threads, stand below
each other. If stderr is no terminal there is none, and no thread for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, Task, TaskID, TextColumn, TimeElapsedColumn

__all__ = ["Bar", "bar", "errors", "show_deep"]

#: Everything that is not a command's result goes here.
errors = Console(stderr=True, soft_wrap=True, emoji=False)

#: What is done sooner needs no bar.
DELAY_SECONDS = 1.0


class Bar:
    """How far one piece of work has come. May be told from any thread."""

    def __init__(self, what: str, total: int | None, unit: str) -> None:
        self.what = what
        self.total = total
        self.unit = unit
        self.done = 0
        self._task: TaskID | None = None
        self._is_over = False
        self._timer = threading.Timer(DELAY_SECONDS, self._appear)
        self._timer.daemon = True

    def __call__(self, steps: int = 1) -> None:
        """So many more steps are done."""
        self.say(self.done + steps)

    def say(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """So many are done, of ``total``, and this is going on, if they are given."""
        self.done = done
        self.total = self.total if total is None else total
        self.what = self.what if what is None else what
        with _lock:
            if self._task is not None:
                _board.update(self._task, completed=done, total=self.total, description=self.what)

    def _begin(self) -> None:
        self._timer.start()

    def _appear(self) -> None:
        with _lock:
            if self._is_over:
                return
            if not _board.tasks:
                _board.start()
            self._task = _board.add_task(self.what, total=self.total, completed=self.done, unit=self.unit)

    def _end(self) -> None:
        self._timer.cancel()
        with _lock:
            self._is_over = True
            if self._task is not None:
                _board.remove_task(self._task)
                self._task = None
                if not _board.tasks:
                    _board.stop()


class _Silent(Bar):
    """Where nobody looks."""

    def __init__(self) -> None:
        super().__init__("", None, "")

    def __call__(self, steps: int = 1) -> None:
        """See :class:`Bar`."""

    def say(self, done: int, total: int | None = None, what: str | None = None) -> None:
        """See :class:`Bar`."""


class _Count(TextColumn):
    """``3 of 12 chunks``, or nothing where nothing is counted."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> str:  # type: ignore[override]
        """See rich."""
        if task.total is None:
            return ""
        return f"{task.completed:,.0f} of {task.total:,.0f} {task.fields.get('unit', '')}"


_lock = threading.RLock()
_board = Progress(
    SpinnerColumn(),
    TextColumn("{task.description}", markup=False),
    BarColumn(),
    _Count(),
    TimeElapsedColumn(),
    console=errors,
    transient=True,
)
_deep = threading.Event()


def show_deep() -> None:
    """This program's terminal is free for bars of what goes on deep inside: transfers, evaluations.

    A display that fills the terminal, like the demonstration's, does without.
    """
    _deep.set()


@contextmanager
def bar(what: str, *, total: int | None = None, unit: str = "", is_deep: bool = False) -> Iterator[Bar]:
    """While the block runs for more than a second: a bar for ``what``, of ``total`` steps if that is known.

    ``is_deep``: only where :func:`show_deep` was called.
    """
    # Not whether colours are forced, as in some pipes.
    if not (errors.is_terminal and errors.file.isatty()) or (is_deep and not _deep.is_set()):
        yield _Silent()
        return
    shown = Bar(what, total, unit)
    shown._begin()  # noqa: SLF001 - one thing in two parts
    try:
        yield shown
    finally:
        shown._end()  # noqa: SLF001
