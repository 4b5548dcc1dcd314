"""All that ``fedmq checkpoint verify`` looks at, and what to do about each thing that is wrong. Reads only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from aggregator.agreement import Agreement
from aggregator.archive import KeptUpdates, base_file
from aggregator.checkpoint import CheckpointStore
from aggregator.core.snapshot import Snapshot, VersionRecord
from aggregator.history import scan_history, version_record
from aggregator.inspection import Condition, FileFacts, check_epoch, check_files, listed, survey
from broker.errors import CheckpointCorrupt, CheckpointError
from broker.messages import UpdateId, parameters_digest

__all__ = ["Finding", "Verification"]

ALTERED = "it was altered: restore the run's whole folder from one backup"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong."""

    what: str
    todo: str = ""
    """The next step; empty if ``what`` says it."""

    def __str__(self) -> str:
        return f"{self.what}: {self.todo}" if self.todo else self.what


class Verification:
    """Reads a run's folder part by part; an aggregator may go on writing."""

    def __init__(self, folder: Path, store: CheckpointStore) -> None:
        """Nothing is read yet. ``folder`` is the run's, ``store`` its checkpoints."""
        self.findings: list[Finding] = []
        self.newest: Snapshot | None = None
        """The newest checkpoint that is whole, once :meth:`files` has run."""
        self.is_behind_damage = False
        """Whether there is a newer one that is damaged."""
        self._folder = folder
        self._store = store

    def files(self, report: Callable[[FileFacts, bool], None]) -> None:
        """Read all checkpoints and the folder's epoch; ``report`` is told of each file and whether it is sound."""
        damaged: list[tuple[str, bool]] = []
        fallback = ""
        for facts, snapshot, wrong in check_files(survey(self._store)):
            if snapshot is not None and self.newest is None:
                self.newest, fallback = snapshot, f"{facts.file} (version {facts.version})"
                self.is_behind_damage = bool(damaged)
            report(facts, facts.condition is Condition.WHOLE and not wrong)
            if facts.condition is Condition.DAMAGED:
                damaged.append((facts.detail, self.newest is None))
            else:
                self.findings += [Finding(what, _about_file(facts.condition)) for what in wrong]
        self.findings[:0] = [Finding(what, _about_damage(is_newer, fallback)) for what, is_newer in damaged]
        if self.newest is not None:
            self.findings += map(Finding, check_epoch(self._store, self.newest))

    def history(self) -> Agreement:
        """Compare the newest checkpoint with the history. After :meth:`files`, which found one.

        Raises :class:`CheckpointError` if the history cannot be read.
        """
        assert self.newest is not None  # noqa: S101  (the caller has looked)
        agreement, file = Agreement(self.newest), self._folder / "history.jsonl"
        agreement.read(file)
        is_whole = not agreement.gaps
        self.findings += [Finding(what, _about_line(is_whole)) for what in agreement.damaged]
        self.findings += [Finding(what, _ABOUT_GAP) for what in agreement.gaps]
        about = ALTERED if is_whole else "of versions whose lines are missing, if nothing else was altered"
        self.findings += [Finding(what, about) for what in agreement.problems]
        if agreement.newest > self.newest.version and not self.is_behind_damage:
            self._require_current(agreement.newest)
        return agreement

    def kept(self) -> int:
        """Read all kept updates and the states that replays begin with; how many there are.

        Raises :class:`CheckpointError` if a file cannot be read.
        """
        assert self.newest is not None  # noqa: S101  (the caller has looked)
        kept = KeptUpdates(self._folder / "updates")
        kept.refresh()
        for what in kept.check():
            self.findings.append(Finding(what, _ABOUT_KEPT))
        begun = frozenset[UpdateId]()
        for file in sorted(kept.folder.glob("base-[0-9]*.safetensors")):
            partial = self._base(file)
            begun |= partial if file == base_file(kept.folder, self.newest.kept_from or 0) else frozenset()
        if self.newest.kept_from is not None:
            self._require_kept(kept, self.newest, self.newest.kept_from, begun)
        return len(kept)

    def _require_current(self, told: int) -> None:
        assert self.newest is not None  # noqa: S101  (the caller has looked)
        if self._store.load().version >= told:
            return  # an aggregator has gone on meanwhile
        self.findings.append(
            Finding(
                f"the history tells of version {told}, and the newest checkpoint has {self.newest.version}",
                "an old copy was restored, and 'fedmq aggregator' refuses to start: restore the newest state, or go on "
                "from this one with 'fedmq aggregator --accept-older'",
            )
        )

    def _base(self, file: Path) -> frozenset[UpdateId]:
        """The partial round in ``file``."""
        try:
            base = self._store.read(file)
            if parameters_digest(base.parameters) == base.digest:
                return frozenset(entry.id for entry in base.entries)
            what = f"{file}: the parameters do not have the digest that stands beside them"
        except CheckpointError as error:
            what = str(error)
        self.findings.append(Finding(what, "replays begin with another, if there is one; restore it from a backup"))
        return frozenset()

    def _require_kept(self, kept: KeptUpdates, newest: Snapshot, since: int, begun: frozenset[UpdateId]) -> None:
        applied = [
            (entry.id, record.epoch, f"version {record.version}")
            for record in _records(self._folder / "history.jsonl", newest)
            if record.version > since
            for entry in (*record.updates, *record.dropped)
        ]
        applied += [(entry.id, newest.epoch, "in the buffer") for entry in newest.entries]
        lost = [f"{one} ({where})" for one, epoch, where in applied if one not in begun and not kept.has(one, epoch)]
        if lost:
            torn = "".join(f"; {text}" for text in kept.damage)
            self.findings.append(
                Finding(f"{len(lost)} updates are not in {kept.folder}: {listed(lost)}{torn}", _ABOUT_KEPT)
            )


_ABOUT_GAP = (
    "restore history.jsonl from a backup; training does not need it, but 'fedmq replay' cannot go past this version"
)
_ABOUT_KEPT = (
    "restore the folder 'updates' from a backup; training does not need it, but 'fedmq replay' can go past these "
    "updates only from a later base"
)


def _records(history: Path, newest: Snapshot) -> Iterator[VersionRecord]:
    """Versions up to ``newest``; lines that are damaged are passed over."""
    told = 0
    for _, line in scan_history(history):
        if line is not None and line.get("kind") == "version":
            yield from (record for record in _record(line) if told < record.version <= newest.version)
            told = max([told, *(record.version for record in _record(line))])
    yield from (record for record in newest.records if record.version > told)


def _record(line: dict[str, object]) -> Iterable[VersionRecord]:
    try:
        return (version_record(line),)
    except CheckpointCorrupt:
        return ()


def _about_file(condition: Condition) -> str:
    match condition:
        case Condition.WHOLE:
            return ALTERED
        case Condition.UNREADABLE:
            return "look after the disk, or the rights to the file"
        case _:
            return ""


def _about_damage(is_newer: bool, fallback: str) -> str:
    if not fallback:
        return "restore one from a backup, without which 'fedmq aggregator' refuses to start"
    if is_newer:
        return (
            f"'fedmq aggregator' falls back to {fallback} by itself; updates acknowledged after that are lost, unless "
            "you restore this file from a backup first"
        )
    return "nothing needs it, there is a newer one that is whole: look after the disk"


def _about_line(is_whole: bool) -> str:
    if is_whole:
        return "it told of no version, and is passed over: leave it, or delete it while no aggregator runs"
    return "restore history.jsonl from a backup; training does not need it"
