"""What a run's folder tells: its history, from the run's first version on, and how it ended.

Only read, never written: the folder is the aggregator's.
"""

from __future__ import annotations

import json
import os
import statistics
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aggregator.tally import CONTRIBUTION_FILE, Tally, count, read_contributions
from fedmq.monitoring.curve import Curve
from fedmq.monitoring.text import clean, real, whole

__all__ = ["MOST_METRICS", "Past", "curve"]

#: Metrics that have a curve; whatever more there is, is in the history.
MOST_METRICS = 16
#: Points of a curve: about as many as a page is wide.
POINTS = 800
LOG_LINES = 300


def curve() -> Curve:
    """An empty one."""
    return Curve(("version", "time", "value"), POINTS)


class Past:
    """A run's folder, followed: :meth:`read` takes in what is new."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read yet."""
        self.folder = folder
        self.problem = ""
        """Why the history cannot be read, if that is so."""
        self._forget()

    def _forget(self) -> None:
        self.version = 0
        self.epoch = 0
        self.loss: float | None = None
        self.evaluated = -1
        self.metrics: dict[str, float | None] = {}
        self.tallies: dict[str, Tally] = {}
        self.rejected: dict[str, Counter[str]] = {}
        """Rejections by reason, by worker."""
        self.lines: deque[tuple[float, str, str, str]] = deque(maxlen=LOG_LINES)
        """Time, level, kind and text of what happened, oldest first; :meth:`read` adds to it."""
        self.curves: dict[str, Curve] = {}
        self._place: tuple[int, int] | None = None
        """Which file was read (its inode), and how far."""

    def read(self) -> None:
        """Take in the lines that the history has got since the last time. A file that was replaced is read anew."""
        try:
            for line in self._fresh():
                self._take(line)
            self.problem = ""
        except OSError as error:
            self.problem = f"{self.folder / 'history.jsonl'}: {error.strerror or error}"

    def outcome(self) -> str:
        """How the run ended, as its summary has it; empty if it has not."""
        try:
            facts = json.loads((self.folder / "summary.json").read_text())
        except (OSError, ValueError, RecursionError):
            return ""
        return clean(facts.get("outcome", "")) if isinstance(facts, Mapping) else ""

    def contributions(self) -> dict[str, float]:
        """What ``fedmq contribution`` found last, by worker."""
        return read_contributions(self.folder / CONTRIBUTION_FILE)

    def _fresh(self) -> Iterator[Mapping[str, Any]]:
        try:
            file = (self.folder / "history.jsonl").open("rb")
        except FileNotFoundError:
            return
        with file:
            facts = os.fstat(file.fileno())
            node, size = facts.st_ino, facts.st_size
            if self._place is not None and (self._place[0] != node or size < self._place[1]):
                self._forget()
            start = self._place[1] if self._place is not None else 0
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    break  # the rest is being written
                start += len(line)
                self._place = node, start
                try:
                    value = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if isinstance(value, Mapping):
                    yield value

    def _take(self, line: Mapping[str, Any]) -> None:
        time, version = real(line.get("time")) or 0.0, whole(line.get("version"), 0)
        match line.get("kind"):
            case "version":
                self._version(line, version, time)
            case "evaluation":
                self._evaluation(line, version, time)
            case "federated":
                metrics = line.get("metrics")
                for name, spread in _items(metrics):
                    self._add(f"own:{name}", version, time, spread.get("mean") if isinstance(spread, Mapping) else None)
            case "start":
                self.epoch = max(self.epoch, whole(line.get("epoch"), 0))
                self._tell(time, "info", "aggregator", f"an aggregator began, epoch {self.epoch}, at version {version}")
            case "rejected":
                self._rejected(line.get("workers"))
            case "command":
                self._tell(time, "info", "command", f"{line.get('what')}: in force at version {version}")
            case "quarantine":
                text = f"{line.get('worker')} is in quarantine: its score is {real(line.get('score')) or 0:.2f}"
                self._tell(time, "warning", "quarantine", text)
            case "release":
                self._tell(time, "info", "quarantine", f"{line.get('worker')} is out of quarantine")
            case _:
                pass

    def _version(self, line: Mapping[str, Any], version: int, time: float) -> None:
        if version <= self.version:  # told again after a takeover
            return
        self.version, self.epoch = version, max(self.epoch, whole(line.get("epoch"), 0))
        self.loss = real(line.get("loss"))
        entries = line.get("updates")
        updates = [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []
        count(self.tallies, line)
        stale = [float(n) for entry in updates if (n := whole(entry.get("staleness"), -1)) >= 0]
        self._add("loss", version, time, self.loss)
        self._add("seconds", version, time, line.get("seconds"))
        self._add("staleness", version, time, statistics.median(stale) if stale else None)
        if line.get("source") is not None:
            text = f"version {version} takes up version {whole(line['source'], 0)} again"
            self._tell(time, "warning", "command", text)

    def _evaluation(self, line: Mapping[str, Any], version: int, time: float) -> None:
        metrics = {name: real(value) for name, value in _items(line.get("metrics"))}
        for name, value in metrics.items():
            self._add(f"held:{name}", version, time, value)
        if version >= self.evaluated:
            self.evaluated, self.metrics = version, metrics

    def _rejected(self, workers: object) -> None:
        for worker, reasons in _items(workers):
            known = self.rejected.setdefault(worker, Counter())
            for reason, times in _items(reasons):
                known[reason] += whole(times, 0)

    def _add(self, name: str, version: int, time: float, value: object) -> None:
        if name not in self.curves:
            kind = name.partition(":")[0]
            if sum(known.startswith(f"{kind}:") for known in self.curves) >= MOST_METRICS:
                return
            self.curves[name] = curve()
        self.curves[name].add(version, time, real(value))

    def _tell(self, time: float, level: str, kind: str, text: str) -> None:
        self.lines.append((time, level, kind, clean(text, 300)))


def _items(value: object) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield clean(name), inner
