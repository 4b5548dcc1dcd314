"""Which versions and how many updates a version is made of: what an operator has taken back counts no more."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aggregator.core.snapshot import VersionRecord
from aggregator.history import read_history, version_line

__all__ = ["Ancestry"]


@dataclass(frozen=True, slots=True)
class _Made:
    """Of what a version was made, by worker."""

    source: int | None
    without: frozenset[str]
    updates: Counter[str]
    spoiled: Counter[str]
    """Of a round that was left out because its step was not finite."""


class Ancestry:
    """How the versions of a run descend from each other. Holds some hundred bytes a version."""

    def __init__(self, history: Path, recent: Iterable[VersionRecord] = ()) -> None:
        """Read ``history``, and after it those in ``recent`` that it lacks.

        Raises :class:`CheckpointError` if the file cannot be read.
        """
        self._made: dict[int, _Made] = {}
        for line in read_history(history):
            if line.get("kind") == "version":
                self._made[line["version"]] = _made(line)
        for record in recent:
            self._made.setdefault(record.version, _made(version_line(record)))

    def workers(self, version: int) -> set[str]:
        """Whose updates went into ``version``, also into rounds that were left out on the way."""
        return {w for at, _ in self._line(version) if (m := self._made.get(at)) for w in (*m.updates, *m.spoiled)}

    def is_whole(self, version: int) -> bool:
        """Whether no line on the way to ``version`` is missing."""
        return all(at in self._made for at, _ in self._line(version))

    def updates(self, version: int) -> dict[int, int]:
        """Versions that ``version`` is made of, and how many updates of each count in it."""
        return {at: _counting(self._made[at], absent) for at, absent in self._line(version) if at in self._made}

    def by_worker(self, version: int) -> dict[int, Counter[str]]:
        """As :meth:`updates`, for each worker."""
        return {at: _of_workers(self._made[at], absent) for at, absent in self._line(version) if at in self._made}

    def taken_back(self, head: int, to: int) -> dict[int, int]:
        """Versions that ``head`` is made of and ``to`` is not, and how many updates of each no longer count."""
        stays = self.updates(to)
        return {at: count for at, count in self.updates(head).items() if at not in stays and count}

    def _line(self, version: int) -> list[tuple[int, frozenset[str]]]:
        """The versions down from ``version``, each with the workers that were left out later."""
        line: list[tuple[int, frozenset[str]]] = []
        absent = frozenset[str]()
        while version > 0:
            line.append((version, absent))
            made = self._made.get(version)
            absent |= made.without if made else frozenset()
            version = made.source if made and made.source is not None else version - 1
        return line


def _counting(made: _Made, absent: frozenset[str]) -> int:
    return sum(_of_workers(made, absent).values())


def _of_workers(made: _Made, absent: frozenset[str]) -> Counter[str]:
    # Those who rebuild a spoiled round without the worker that may have spoiled it count it.
    entries = made.spoiled if made.spoiled.keys() & absent else made.updates
    return Counter({worker: count for worker, count in entries.items() if worker not in absent})


def _made(line: Mapping[str, Any]) -> _Made:
    source = line.get("source")
    source = source if isinstance(source, int) and 0 <= source < line["version"] else None
    spoiled = _workers(line.get("dropped")) if source is not None and line.get("settings") else Counter[str]()
    return _Made(source, frozenset(map(str, line.get("without") or ())), _workers(line.get("updates")), spoiled)


def _workers(entries: object) -> Counter[str]:
    found = entries if isinstance(entries, list) else []
    return Counter(str(entry.get("worker")) for entry in found if isinstance(entry, Mapping))
