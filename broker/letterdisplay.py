"""Dead letters as text: a table with a summary by reason, and one letter in full."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from rich.markup import escape
from rich.table import Table as Grid

from broker.console import say, say_table
from broker.letters import DeadLetter, Selection

__all__ = ["Summary", "by_reason", "count_reason", "letter_table", "row_of", "say_letter"]

#: Reasons that the summary tells apart; strangers may bring any number.
REASONS = 100

COLUMNS = ("#", "rejected (UTC)", "update", "version", "examples", "bytes", "reason", "detail")
NUMBERS = {"#", "version", "examples", "bytes", "norm", "not finite"}


class Summary:
    """Counts letters by reason: those that are meant, and all, to say what there is if none is."""

    def __init__(self, wanted: Selection) -> None:
        self.meant = 0
        self._wanted = wanted
        self._reasons: Counter[str] = Counter()
        self._all: Counter[str] = Counter()

    def counts(self, letter: DeadLetter) -> bool:
        """Count ``letter``; whether it is meant."""
        count_reason(self._all, letter.reason)
        is_meant = self._wanted.matches(letter)
        if is_meant:
            self.meant += 1
            count_reason(self._reasons, letter.reason)
        return is_meant

    def text(self, run: str) -> str:
        """One line."""
        if not self._all:
            return f"run {run!r}: no rejected updates"
        if not self.meant:
            return f"run {run!r}: none of the {self._all.total():,} rejected updates matches ({by_reason(self._all)})"
        return f"run {run!r}: {self.meant:,} rejected updates: {by_reason(self._reasons)}"


def count_reason(counter: Counter[str], reason: str) -> None:
    """Count ``reason`` in ``counter``, which does not grow without bound."""
    counter[reason if reason in counter or len(counter) < REASONS else "(others)"] += 1


def by_reason(counter: Counter[str]) -> str:
    """The counts, the largest first."""
    return ", ".join(f"{reason} {count:,}" for reason, count in counter.most_common())


def letter_table() -> Grid:
    """An empty table of letters."""
    return _table(*COLUMNS)


def _table(*names: str) -> Grid:
    table = Grid(box=None, pad_edge=False, header_style="bold")
    for name in names:
        wide = name in {"update", "detail", "tensor"}
        table.add_column(name, justify="right" if name in NUMBERS else "left", no_wrap=not wide, overflow="fold")
    return table


def row_of(letter: DeadLetter) -> list[str]:
    """A row of :func:`letter_table`."""
    cells = (
        letter.number,
        None if letter.time is None else f"{letter.time:%Y-%m-%d %H:%M:%S}",
        _who(letter),
        letter.base_version,
        letter.examples,
        f"{letter.bytes:,}",
        f"{letter.reason} (before: {letter.former})" if letter.former else letter.reason,
        letter.detail,
    )
    return ["-" if cell is None else escape(str(cell)) for cell in cells]


def _who(letter: DeadLetter) -> str:
    """The update's id; and who published it, if that is somebody else, or all that is known."""
    if letter.id is None:
        return f"{letter.worker}/?"
    return str(letter.id) if letter.id.worker == letter.worker else f"{letter.id} (from {letter.worker})"


def say_letter(found: Mapping[str, Any]) -> None:
    """One letter: a line a fact, then its tensors as a table."""
    for key, value in found.items():
        if key == "tensors":
            continue
        inner = value if isinstance(value, dict) else {"": value}
        for name, one in inner.items():
            say(f"{f'{key} {name}'.strip():24} {'-' if one is None or one == '' else one}")
    if tensors := found.get("tensors"):
        table = _table("tensor", "shape", "dtype", "norm", "not finite")
        for tensor in tensors:
            norm = tensor["norm"] if isinstance(tensor["norm"], str) else f"{tensor['norm']:.6g}"
            cells = (tensor["name"], tensor["shape"], tensor["dtype"], norm, tensor["not_finite"])
            table.add_row(*(escape(str(cell)) for cell in cells))
        say_table(table)
