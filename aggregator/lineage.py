"""From which state, along which versions and by which updates a version can be rebuilt: what a run's folder knows.

Memory holds where things are (a few hundred bytes a version and an update), one line of the history and one update
at a time, and the models that are rebuilt.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from aggregator.archive import KeptUpdates
from aggregator.checkpoint import CheckpointStore
from aggregator.core.snapshot import Entry, SnapshotHead, VersionRecord
from aggregator.history import scan_history, version_record
from aggregator.replay import Link, Rebuild, distance, needed, rebuild
from aggregator.spool import DiskSpool
from broker.errors import CheckpointCorrupt, LineageError, WireError
from broker.jsontext import from_json
from broker.messages import Update, UpdateId
from broker.wire import decode

__all__ = ["Lineage", "Replay", "Way", "ranges"]

log = logging.getLogger("fedmq.lineage")

#: Missing updates that an error names.
SHOWN = 3


@dataclass(frozen=True, slots=True)
class Way:
    """How a version is reached."""

    base: Path
    """A kept state to begin with."""
    steps: tuple[tuple[int, frozenset[str]], ...]
    """The versions in between and the one itself, each with the workers that a later rebuild has left out."""


@dataclass(frozen=True, slots=True)
class _Fact:
    """What is known of a version without its line."""

    start: int
    """Where its line begins in the history; -1 if the newest checkpoint has it."""
    source: int | None


class Lineage:
    """The versions of one run."""

    def __init__(self, folder: Path, store: CheckpointStore) -> None:
        """Nothing is read before :meth:`refresh`.

        Args:
            folder: the run's, with ``history.jsonl`` and ``updates``.
            store: its checkpoints.
        """
        self.history = folder / "history.jsonl"
        self.kept = KeptUpdates(folder / "updates")
        self.newest = 0
        """The newest version."""
        self._store = store
        self._facts: dict[int, _Fact] = {}
        self._recent: dict[int, VersionRecord] = {}
        self._damaged: list[int] = []
        self._bases: dict[int, Path] = {}
        self._broken: set[Path] = set()

    def refresh(self, newest: SnapshotHead) -> None:
        """Look at what there is now. Raises :class:`CheckpointError`.

        Args:
            newest: the newest checkpoint, which may know versions that the history does not have yet.
        """
        self._facts.clear()
        self._damaged.clear()
        for number, (start, line) in enumerate(scan_history(self.history), 1):
            if line is None:
                self._damaged.append(number)
            elif line.get("kind") == "version" and isinstance(version := line.get("version"), int):
                source = line.get("source")
                self._facts.setdefault(version, _Fact(start, source if isinstance(source, int) else None))
        self._recent = {record.version: record for record in newest.records if record.version not in self._facts}
        self._facts |= {record.version: _Fact(-1, record.source) for record in self._recent.values()}
        self.newest = max([newest.version, *self._facts])
        self.kept.refresh()
        bases = self.kept.folder.glob("base-[0-9]*.safetensors")
        self._bases = {int(file.stem[5:]): file for file in bases if file not in self._broken}

    @property
    def bases(self) -> dict[int, Path]:
        """Files with the state of a version from which on updates were kept."""
        return dict(self._bases)

    def pass_over(self, base: Path) -> None:
        """``base`` cannot be read."""
        self._broken.add(base)
        self._bases = {version: file for version, file in self._bases.items() if file != base}

    def record(self, version: int) -> VersionRecord:
        """The line of ``version``. Raises :class:`LineageError`."""
        if version in self._recent:
            return self._recent[version]
        fact = self._facts.get(version)
        if fact is None:
            lines = f" (damaged lines: {ranges(self._damaged)})" if self._damaged else ""
            raise LineageError(f"{self.history} has no line of version {version}{lines}")
        try:
            with self.history.open("rb") as file:
                file.seek(fact.start)
                line: Any = from_json(file.readline())
            record = version_record(line)
        except (OSError, ValueError, CheckpointCorrupt) as error:
            raise LineageError(f"{self.history}: {error}") from None
        if record.source is not None and not 0 <= record.source < version:
            raise LineageError(f"{self.history}: version {version} cannot be made of version {record.source}")
        return record

    def knows(self, version: int) -> bool:
        """Whether there is a line of ``version``."""
        return version in self._facts

    def records(self) -> Iterator[VersionRecord]:
        """All versions, in order."""
        for version in sorted(self._facts):
            yield self.record(version)

    def way(self, version: int, leave_out: frozenset[str] = frozenset()) -> Way:
        """How to rebuild ``version``: from the newest state that serves, or from the earliest to leave somebody out.

        Raises :class:`LineageError` if it cannot be: it says what is missing, and which versions can be.
        """
        if not 0 <= version <= self.newest:
            raise LineageError(f"there is no version {version}; the newest is {self.newest}")
        found, trouble = self._search(version, leave_out)
        if found is None:
            can = ranges(self.rebuildable())
            damage = "".join(f"; {text}" for text in self.kept.damage[:SHOWN])
            raise LineageError(
                f"version {version} cannot be rebuilt: {trouble}{damage}. "
                + (f"Those that can be: {can}" if can else "Set aggregator.keep_updates: then later versions can be")
            )
        return found

    def rebuildable(self) -> list[int]:
        """Versions that can be rebuilt."""
        good = set(self._bases)
        for version in sorted(self._facts):
            try:
                link = Link(self.record(version))
            except LineageError:
                continue
            below = version - 1 if link.record.source is None else link.record.source
            missing = set(self._missing(link))
            if below in good and (not missing or missing <= self._begun(below)):
                good.add(version)
        return sorted(good)

    def links(self, way: Way) -> Iterator[Link]:
        """The versions along ``way``. Raises :class:`LineageError`."""
        for version, without in way.steps:
            yield Link(self.record(version), without)

    def fetch(self, entry: Entry, epoch: int) -> Update:
        """The update of ``entry``, folded under ``epoch`` or the newest before it. Raises :class:`LineageError`."""
        try:
            update = decode(self.kept.read(entry.id, epoch))
        except WireError as error:
            raise LineageError(f"update {entry.id} as it was kept cannot be read: {error}") from None
        if not isinstance(update, Update):
            raise LineageError(f"update {entry.id} as it was kept is a {type(update).__name__}")
        return update

    def _search(self, version: int, leave_out: frozenset[str]) -> tuple[Way | None, str]:
        """Walk down from ``version``: the way from the state that serves, and what ended the walk."""
        found: Way | None = None
        steps: list[tuple[int, frozenset[str]]] = []
        without: frozenset[str] = frozenset()
        missing: set[UpdateId] = set()
        trouble, at = "", version
        while True:
            if at in self._bases and (not missing or missing <= _partial(self._bases[at])):
                found = Way(self._bases[at], tuple(reversed(steps)))
                if not leave_out and not without and steps:
                    return found, ""
            if at == 0 and at not in self._facts:
                return found, trouble or "updates were not kept from the beginning"
            try:
                record = self.record(at)
            except LineageError as error:
                return found, trouble or str(error)
            is_round = record.source is None or bool(record.settings)
            if missing and (is_round or at in self._bases):
                return found, trouble
            steps.append((at, without))
            missing |= set(self._missing(Link(record, without), leave_out))
            if missing:
                trouble = trouble or self._lacking(at, missing)
            without |= set(record.without)
            at = at - 1 if record.source is None else record.source

    def _missing(self, link: Link, leave_out: frozenset[str] = frozenset()) -> list[UpdateId]:
        epoch = link.record.epoch
        return [entry.id for entry in needed(link, leave_out) if not self.kept.has(entry.id, epoch)]

    def _begun(self, version: int) -> frozenset[UpdateId]:
        """What is in the partial round of the state that a round after ``version`` begins with."""
        while version not in self._bases:
            fact = self._facts.get(version)
            if fact is None or fact.source is None:
                return frozenset()
            version = fact.source
        return _partial(self._bases[version])

    def _lacking(self, version: int, missing: set[UpdateId]) -> str:
        names = sorted(map(str, missing))
        more = f" and {len(names) - SHOWN} more" if names[SHOWN:] else ""
        return f"version {version} was made of {', '.join(names[:SHOWN])}{more}, not to be found in {self.kept.folder}"


class Replay:
    """Rebuilds a version, and the same version without some workers. May go on when the run has gone on."""

    def __init__(
        self,
        lineage: Lineage,
        store: CheckpointStore,
        leave_out: frozenset[str] = frozenset(),
        *,
        apart: Sequence[frozenset[str]] | None = None,
    ) -> None:
        """Nothing is rebuilt before :meth:`run`.

        Args:
            lineage: has been refreshed.
            store: the run's checkpoints.
            leave_out: workers to do without.
            apart: of these, whom to leave out of each of several rebuilds; of one all, if None.
        """
        self.lineage = lineage
        self.base_version = 0
        """The version that it began with."""
        self.workers: set[str] = set()
        """Whose updates it has met."""
        self._store = store
        self._leave_out = leave_out
        self._apart = apart if apart is not None else [leave_out] if leave_out else []
        self._done: Way | None = None
        self._rebuilds: tuple[Rebuild, ...] = ()

    @property
    def original(self) -> Rebuild:
        """The version as it was."""
        return self._rebuilds[0]

    @property
    def result(self) -> Rebuild:
        """The version as it is without the workers that were to be left out."""
        return self._rebuilds[-1]

    @property
    def others(self) -> tuple[Rebuild, ...]:
        """The version as it is without those who were to be left out of each."""
        return self._rebuilds[1:]

    @property
    def distance(self) -> float:
        """How far (L2) the result is from the original."""
        return distance(self.original.parameters, self.result.parameters)

    def plan(self, version: int) -> int:
        """Find out how to reach ``version``, from where the rebuild stands; how many versions that takes.

        Raises:
            LineageError: it cannot be rebuilt, or the run was taken back since the rebuild began.
        """
        way = self.lineage.way(version, self._leave_out)
        if self._done is None:
            way = self._begin(version, way)
        elif way.base != self._done.base or way.steps[: len(self._done.steps)] != self._done.steps:
            raise LineageError("the run was taken back while this was going on: nothing was changed, try again")
        done = () if self._done is None else self._done.steps
        self._ahead = Way(way.base, way.steps[len(done) :])
        self._done = way
        return len(self._ahead.steps)

    def links(self) -> Iterator[Link]:
        """What was planned, for those who rebuild it themselves. Raises :class:`LineageError`."""
        return self.lineage.links(self._ahead)

    def run(self) -> Iterator[int]:
        """Rebuild what was planned; gives each version when it is there.

        Raises :class:`LineageError` at the first difference to what the history tells.
        """
        try:
            # The updates of a round at a time, of a strategy that needs them all: not in the run's folder, which is
            # only read here.
            with tempfile.TemporaryDirectory(prefix="fedmq-replay-") as scratch:
                spool, links = DiskSpool(Path(scratch), 0), self.lineage.links(self._ahead)
                for record in rebuild(links, self.lineage.fetch, *self._rebuilds, spool=spool):
                    self.workers.update(entry.id.worker for entry in (*record.updates, *record.dropped))
                    spool.sweep(frozenset)
                    yield record.version
        finally:
            self.lineage.kept.close()

    def _begin(self, version: int, way: Way) -> Way:
        while True:
            try:
                base = self._store.read(way.base)
                break
            except CheckpointCorrupt as error:
                log.warning("%s; passed over", error)
                self.lineage.pass_over(way.base)
                way = self.lineage.way(version, self._leave_out)
        self.base_version = base.version
        self._rebuilds = (Rebuild(base), *(Rebuild(base, absent) for absent in self._apart))
        if self.lineage.knows(base.version):
            self.original.check(self.lineage.record(base.version))
        return way


def ranges(numbers: list[int]) -> str:
    """Sorted ``numbers`` as text: ``1-12, 14``."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][1:] = [number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def _partial(base: Path) -> frozenset[UpdateId]:
    """Updates in the partial round that ``base`` holds; its tensors are not read."""
    try:
        with safe_open(base, framework="np") as content:
            entries = from_json((content.metadata() or {})["state"])["entries"]
        return frozenset(UpdateId(**entry["id"]) for entry in entries)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        log.warning("%s cannot be read", base)
        return frozenset()
