"""Whether the history tells what the newest checkpoint holds: each version once, each applied update once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aggregator.core.ledger import Ledger
from aggregator.core.snapshot import Entry, Snapshot, VersionRecord
from aggregator.history import scan_history, version_record
from aggregator.inspection import listed
from broker.errors import CheckpointCorrupt
from broker.messages import UpdateId

__all__ = ["Agreement"]


@dataclass(slots=True)
class Agreement:
    """The versions of a run up to a checkpoint, as its history tells them, and what is wrong with them.

    Versions after the checkpoint's are counted in ``newest`` and otherwise passed over: an aggregator may have
    made them meanwhile.
    """

    snapshot: Snapshot
    problems: list[str] = field(default_factory=list)
    """What does not agree, but for the following two."""
    damaged: list[str] = field(default_factory=list)
    """Lines that cannot be read."""
    gaps: list[str] = field(default_factory=list)
    """Versions that no line tells of."""
    versions: int = 0
    """Versions up to the checkpoint's that are told."""
    newest: int = 0
    """The newest version that is told."""
    told: Ledger = field(default_factory=Ledger)
    """Updates that are told of, those of versions that were taken back apart."""
    taken_back: Ledger = field(default_factory=Ledger)
    """Updates that only versions that were taken back tell of."""
    _after: dict[int, str] = field(default_factory=dict)
    _last: int = 0

    def read(self, history: Path) -> None:
        """Compare. Raises :class:`CheckpointError` if the file cannot be read."""
        for record in self._records(history):
            self.newest = max(self.newest, record.version)
            if record.version <= self.snapshot.version:
                self._take(record)
        # The newest versions, which the history may not have yet.
        for record in self.snapshot.records:
            if record.version > self._last:
                self._take(record)
        self._close()

    @property
    def given_up(self) -> int:
        """Updates that versions that were taken back tell of and that do not count: an older state took over."""
        ledger = Ledger(self.snapshot.ledger)
        return sum(one not in ledger for one in self.taken_back)

    def _records(self, history: Path) -> Iterator[VersionRecord]:
        for start, line in scan_history(history):
            if line is None:
                self.damaged.append(f"{history.name}: the line at byte {start} is damaged")
            elif line.get("kind") == "version":
                yield from self._record(history, line)

    def _record(self, history: Path, line: Mapping[str, Any]) -> Iterator[VersionRecord]:
        try:
            yield version_record(line)
        except CheckpointCorrupt as error:
            self.damaged.append(f"{history.name}: {error}")

    def _take(self, record: VersionRecord) -> None:
        version = record.version
        if version <= self._last:
            self.problems.append(f"version {version} is told after version {self._last}")
            return
        self._require_no_gap(self._last + 1, version - 1)
        base = record.version - 1 if record.source is None else record.source
        seen = record.before if record.source is None else record.after
        # A state that was rebuilt without some workers is like no version before.
        if not record.without and self._after.get(base, seen) != seen:
            self.problems.append(f"version {version} does not begin with the parameters of version {base}")
        self.versions, self._last = self.versions + 1, version
        self._after[version] = record.after
        self._tell((*record.updates, *record.dropped), is_void=self._is_void(version), where=f"version {version}")

    def _tell(self, entries: tuple[Entry, ...], *, is_void: bool, where: str) -> None:
        ledger = self.taken_back if is_void else self.told
        for entry in entries:
            if entry.id not in ledger:
                ledger.add(entry.id)
            elif not is_void:
                self.problems.append(f"update {entry.id} is told of in {where} and before: it counted twice")

    def _is_void(self, version: int) -> bool:
        return any(first <= version <= last for first, last in self.snapshot.void)

    def _require_no_gap(self, first: int, last: int) -> None:
        missing = [version for version in range(first, last + 1) if not self._is_void(version)]
        if missing:
            which = f"version {missing[0]}" if len(missing) == 1 else f"{len(missing)} versions from {missing[0]} on"
            self.gaps.append(f"no line tells of {which}")

    def _close(self) -> None:
        snapshot = self.snapshot
        self._require_no_gap(self._last + 1, snapshot.version)
        if self._after.get(snapshot.version, snapshot.digest) != snapshot.digest:
            self.problems.append(f"the parameters are not those that the line of version {snapshot.version} tells of")
        self._tell(snapshot.entries, is_void=False, where="the buffer")
        ledger = Ledger(snapshot.ledger)
        self._list("applied updates are told of nowhere", (i for i in ledger if not self._is_told(i)))
        self._list("updates are told of and not in the ledger", (i for i in self.told if i not in ledger))

    def _is_told(self, update_id: UpdateId) -> bool:
        return update_id in self.told or update_id in self.taken_back

    def _list(self, what: str, ids: Iterator[UpdateId]) -> None:
        names = [str(one) for one in ids]
        if names:
            self.problems.append(f"{len(names)} {what}: {listed(names)}")
