"""A run's history as text and as JSON."""

from __future__ import annotations

import json
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table as Grid

from aggregator.core.snapshot import VersionRecord
from aggregator.history import read_history, version_line
from broker.console import say, say_table

__all__ = ["Wanted", "say_history", "say_json"]

#: Workers that a version's row names.
SHOWN_NAMES = 5
#: Digits of a digest in a row.
DIGITS = 12

COLUMNS = ("version", "time (UTC)", "updates", "of", "staleness", "loss", "digest", "")
NUMBERS = {"version", "updates", "staleness", "loss"}
#: Of an update, in a version in full.
FACTS = ("base_version", "staleness", "weight", "examples", "loss", "cosine")

Line = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which lines are meant."""

    version: int | None = None
    worker: str | None = None

    def matches(self, line: Line) -> bool:
        """Whether ``line`` is meant."""
        if self.version is not None and line.get("version") != self.version:
            return False
        if self.worker is None:
            return self.version is None or line.get("kind") != "start"
        if line.get("kind") in {"quarantine", "release"}:
            return bool(line.get("worker") == self.worker)
        if line.get("kind") == "rejected":
            return self.worker in (line.get("workers") or {})
        return any(entry.get("worker") == self.worker for entry in _entries(line, "updates", "dropped"))


def say_history(file: Path, recent: tuple[VersionRecord, ...], wanted: Wanted, *, limit: int) -> int:
    """Show the newest ``limit`` lines that are wanted, or one version in full; how many there are."""
    newest: deque[Line] = deque(maxlen=limit)
    count = 0
    for line in _lines(file, recent):
        if wanted.matches(line):
            newest.append(line)
            count += 1
    if wanted.version is not None:
        for line in newest:
            _say_in_full(line, wanted)
    elif newest:
        table = _table(*COLUMNS)
        for line in newest:
            table.add_row(*map(escape, _row(line, wanted)))
        say_table(table)
    if count > limit:
        say(f"… and {count - limit:,} earlier ones (--limit, or --json)")
    elif not count and wanted == Wanted():
        say("nothing yet")
    return count


def say_json(file: Path, recent: tuple[VersionRecord, ...], wanted: Wanted, *, limit: int | None) -> int:
    """Write the newest ``limit`` lines that are wanted, or all, as one array; how many it wrote.

    Each as the history has it, but for its time in ISO 8601.
    """
    shown = 0
    lines = (line for line in _lines(file, recent) if wanted.matches(line))
    for line in lines if limit is None else deque(lines, maxlen=limit):
        sys.stdout.write(f"{',' if shown else '['}\n{json.dumps({**line, **_iso(line)})}")
        shown += 1
    sys.stdout.write("\n]\n" if shown else "[]\n")
    return shown


def _iso(line: Line) -> dict[str, str]:
    moment = _moment(line)
    return {} if moment is None else {"time": moment.isoformat(timespec="milliseconds")}


def _lines(file: Path, recent: tuple[VersionRecord, ...]) -> Iterator[Line]:
    """The history's lines, and those that only the newest checkpoint has."""
    told = 0
    for line in read_history(file):
        version = line.get("version")
        if line.get("kind") == "version" and isinstance(version, int):
            told = max(told, version)
        yield line
    for record in recent:
        if record.version > told:
            yield version_line(record)


def _entries(line: Line, *keys: str) -> list[Line]:
    found = [entry for key in keys for entry in line.get(key) or ()]
    return [entry for entry in found if isinstance(entry, Mapping)]


def _row(line: Line, wanted: Wanted) -> list[str]:
    version, moment = str(line.get("version", "")), _time(line)
    if line.get("kind") != "version":
        return [version, moment, "", "", "", "", "", _event(line)]
    entries = _entries(line, "updates")
    mine = [entry for entry in entries if wanted.worker in (None, entry.get("worker"))]
    staleness = sorted({int(entry.get("staleness", 0)) for entry in mine})
    span = f"{staleness[0]}-{staleness[-1]}" if len(staleness) > 1 else "".join(map(str, staleness))
    count = str(len(entries)) if len(mine) == len(entries) else f"{len(mine)} of {len(entries)}"
    digest = str(line.get("after", ""))[:DIGITS]
    return [version, moment, count, _who(entries), span, _number(line.get("loss")), digest, _note(line)]


def _who(entries: list[Line]) -> str:
    counts = Counter(str(entry.get("worker")) for entry in entries)
    names = [f"{name} ({n})" if n > 1 else name for name, n in sorted(counts.items())]
    return ", ".join(names[:SHOWN_NAMES]) + (f" and {len(names) - SHOWN_NAMES} more" if names[SHOWN_NAMES:] else "")


def _note(line: Line) -> str:
    count = len(_entries(line, "dropped"))
    dropped = f"{count} update{'s' * (count != 1)}"
    if line.get("source") is None:
        return ""
    if line.get("settings"):
        return f"the step was not finite; {dropped} left out"
    without = f" without {', '.join(map(str, line['without']))}" if line.get("without") else ""
    return f"taken back to version {line['source']}{without}; {dropped} dropped"


def _spreads(metrics: Any) -> str:
    figures = metrics.items() if isinstance(metrics, Mapping) else ()
    return ", ".join(
        f"{name} {_number(of.get('mean'))} ({_number(of.get('min'))} to {_number(of.get('max'))})"
        for name, of in figures
        if isinstance(of, Mapping)
    )


def _rejections(workers: Any) -> str:
    """``2 of w0 (not-finite), 1 of w1 (stale)``, as many workers as a version names."""
    pairs = [(w, r) for w, r in (workers.items() if isinstance(workers, Mapping) else ()) if isinstance(r, Mapping)]
    texts = [f"{sum(r.values())} of {w or '?'} ({', '.join(map(str, r))})" for w, r in pairs[:SHOWN_NAMES]]
    return ", ".join(texts) + (f" and of {len(pairs) - SHOWN_NAMES} more" if pairs[SHOWN_NAMES:] else "")


def _event(line: Line) -> str:  # noqa: PLR0911 - one a kind of line
    match line.get("kind"):
        case "start":
            return f"an aggregator took up the run: epoch {line.get('epoch')}"
        case "command":
            return f"{line.get('what')}{' (from the next round on)' if line.get('pending') else ''}"
        case "quarantine":
            until = _time({"time": line.get("until")})
            return f"{line.get('worker')} is in quarantine until {until} UTC: score {line.get('score')}"
        case "release":
            return f"{line.get('worker')} is out of quarantine"
        case "evaluation":
            metrics = line.get("metrics")
            figures = metrics.items() if isinstance(metrics, Mapping) else ()
            return f"{line.get('worker')}: " + ", ".join(f"{name} {_number(value)}" for name, value in figures)
        case "rejected":
            return f"rejected: {_rejections(line.get('workers'))}"
        case "federated":
            return f"{line.get('workers')} workers on their own data: {_spreads(line.get('metrics'))}"
    return str(line.get("kind"))


def _say_in_full(line: Line, wanted: Wanted) -> None:
    if line.get("kind") != "version":
        say(f"{_time(line)}  {_event(line)}")
        return
    say(f"version {line.get('version')}, {_time(line)} UTC, epoch {line.get('epoch')}{_prefixed(_note(line))}")
    for key in ("before", "after"):
        say(f"  {key:8} {line.get(key)}")
    settings = line.get("settings")
    if isinstance(settings, Mapping) and settings:
        say("  settings " + ", ".join(f"{name}={value}" for name, value in sorted(settings.items())))
    say(f"  {_number(line.get('seconds'))} s, mean training loss {_number(line.get('loss')) or 'unknown'}")
    table = _table("update", "from version", *FACTS[1:], "")
    for key in ("updates", "dropped"):
        for entry in _entries(line, key):
            if wanted.worker in (None, entry.get("worker")):
                name = f"{entry.get('worker')}/{entry.get('incarnation')}/{entry.get('seq')}"
                facts = [_number(entry.get(fact)) for fact in FACTS]
                table.add_row(*map(escape, (name, *facts, "" if key == "updates" else key)))
    if table.row_count:
        say_table(table)


def _prefixed(note: str) -> str:
    return f": {note}" if note else ""


def _time(line: Line) -> str:
    moment = _moment(line)
    return "" if moment is None else f"{moment:%Y-%m-%d %H:%M:%S}"


def _moment(line: Line) -> datetime | None:
    moment = line.get("time")
    try:
        return None if moment is None else datetime.fromtimestamp(float(moment), UTC)
    except (TypeError, ValueError, OverflowError, OSError):
        return None


def _number(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def _table(*names: str) -> Grid:
    table = Grid(box=None, pad_edge=False, header_style="bold")
    for name in names:
        numeric = name in NUMBERS | {"from version", *FACTS}
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    return table
