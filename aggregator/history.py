"""``history.jsonl``: one line a version, an evaluation, a start. For people and their plotting scripts.

The checkpoint is the truth; the history follows it. A version's line is appended after the checkpoint that
holds it is durable, and made up for at the next start if a crash came in between.
"""

from __future__ import annotations

import json
import logging
import math
import os
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from aggregator.core.effects import EvaluationRecord, Quarantined, Released
from aggregator.core.federated import Federated
from aggregator.core.snapshot import Entry, VersionRecord
from aggregator.disk import sync_folder, write_all
from aggregator.software import software
from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten, first_problem
from broker.jsontext import from_json

__all__ = ["History", "read_history", "scan_history", "version_line", "version_record"]

log = logging.getLogger("fedmq.history")

#: Bytes at the end of the file that are looked at first.
TAIL = 1 << 20

_RECORD: TypeAdapter[VersionRecord] = TypeAdapter(VersionRecord)
_ID_FIELDS = ("worker", "incarnation", "seq")


class History:
    """Appends to the history file of a run. What the disk does not take is kept and tried again."""

    def __init__(self, file: Path) -> None:
        """Nothing is touched yet."""
        self.file = file
        self.last_version = 0
        """The newest version that the file has."""
        self.last_epoch = 0
        """The highest epoch that the end of the file tells of."""
        self.last_time = 0.0
        """The latest time there, seconds since 1970."""
        self._late: list[str] = []
        self._written: list[tuple[int, bytes]] = []
        self._is_doubtful = False
        self._is_named = False
        self._lock = threading.Lock()

    def mend(self) -> None:
        """Cut half a line at the end, which a crash may have left, and see what was told last.

        Raises :class:`CheckpointNotWritten`.
        """
        try:
            if self.file.exists():
                self._mend()
        except OSError as error:
            raise CheckpointNotWritten(f"{self.file}: {error.strerror}") from None

    def open(self, records: tuple[VersionRecord, ...], *, epoch: int, version: int, now: float) -> None:
        """Add the versions in ``records`` that the file lacks, and note the start. After :meth:`mend`."""
        for record in records:
            self.version(record)
        start = {"kind": "start", "epoch": epoch, "version": version, "time": round(now, 3)}
        self._append({**start, "software": software()})

    def sync(self) -> None:
        """Make durable what was appended, so that the checkpoint need not repeat it.

        Raises :class:`CheckpointNotWritten`.
        """
        try:
            with self._lock:
                self._write()
                if self._is_doubtful:
                    self._write_again()
                count, self._is_doubtful = len(self._written), True
            # Not under the lock: whoever appends must not wait for the disk.
            with self.file.open("ab") as file:
                os.fsync(file.fileno())
            if not self._is_named:
                sync_folder(self.file.parent)
        except OSError as error:
            raise CheckpointNotWritten(f"{self.file}: {error.strerror}; make room") from None
        with self._lock:
            del self._written[:count]
        self._is_named, self._is_doubtful = True, False

    def version(self, record: VersionRecord) -> None:
        """A version is durable. One that the file has already is passed over."""
        if record.version <= self.last_version:
            return
        self.last_version = record.version
        self._append(version_line(record))

    def evaluation(self, record: EvaluationRecord, now: float) -> None:
        """An evaluator has reported."""
        self._append(
            {
                "kind": "evaluation",
                "version": record.version,
                "worker": record.worker,
                "time": round(now, 3),
                # JSON has no NaN, and a model that diverged is no reason for a file that cannot be read.
                "metrics": {name: value if math.isfinite(value) else None for name, value in record.metrics.items()},
            }
        )

    def federated(self, figures: Federated, now: float) -> None:
        """Workers have reported on versions, by data that they hold out."""
        metrics = {
            name: {"mean": s.mean, "min": s.minimum, "median": s.median, "max": s.maximum, "std": s.std}
            for name, s in figures.metrics.items()
        }
        self._append(
            {
                "kind": "federated",
                "version": figures.version,
                "versions": list(figures.versions),
                "workers": figures.workers,
                "examples": figures.examples,
                "time": round(now, 3),
                "metrics": metrics,
            }
        )

    def command(self, text: str, *, version: int, is_pending: bool, now: float) -> None:
        """An operator's command was executed."""
        line = {"kind": "command", "what": text, "version": version, "pending": is_pending, "time": round(now, 3)}
        self._append(line)

    def standing(self, fact: Quarantined | Released, now: float) -> None:
        """A worker's quarantine has begun, or ended."""
        line: dict[str, Any] = {"kind": "release", "version": fact.version, "worker": fact.worker}
        if isinstance(fact, Quarantined):
            line |= {"kind": "quarantine", "score": round(fact.score, 4), "until": round(fact.until, 3)}
        self._append({**line, "time": round(now, 3)})

    def rejected(self, workers: Mapping[str, Mapping[str, int]], *, version: int, now: float) -> None:
        """Updates were rejected since the last such line: how many of each worker, by reason."""
        plain = {name: dict(reasons) for name, reasons in workers.items()}
        self._append({"kind": "rejected", "version": version, "workers": plain, "time": round(now, 3)})

    def _append(self, line: Mapping[str, Any]) -> None:
        with self._lock:
            self._late.append(json.dumps(line, allow_nan=False) + "\n")
            try:
                self._write()
            except OSError as error:
                log.warning("%s: %s; kept in memory, make room", self.file, error.strerror)

    def _write(self) -> None:
        if not self._late:
            return
        content = "".join(self._late).encode()
        # Unbuffered: a buffer that could not be emptied would try again after the file was cut to its old length.
        with self.file.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                write_all(file, content)
            except OSError:
                if file.seek(0, os.SEEK_END) <= end + len(content):  # nobody else has written behind it
                    file.truncate(end)
                raise
        self._written.append((end, content))
        self._late.clear()

    def _write_again(self) -> None:
        """After a failed fsync the system may call clean what the disk does not have."""
        handle = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
        with os.fdopen(handle, "r+b", buffering=0) as file:
            for start, content in self._written:
                file.seek(start)
                write_all(file, content)

    def _mend(self) -> None:
        with self.file.open("r+b") as file:
            end = file.seek(0, os.SEEK_END)
            length = TAIL
            # From the end, in growing pieces: the history of a long run is large.
            while True:
                start = max(0, end - length)
                file.seek(start)
                tail = file.read(end - start)
                whole = tail[: tail.rfind(b"\n") + 1]
                lines = list(_lines(whole))
                versions = [int(_figure(line, "version")) for line in lines if line.get("kind") == "version"]
                if start == 0 or (versions and whole):
                    break
                length *= 8
            self.last_version = max(versions, default=0)
            self.last_epoch = max((int(_figure(line, "epoch")) for line in lines), default=0)
            self.last_time = max((_figure(line, "time") for line in lines), default=0.0)
            file.truncate(start + len(whole))


def read_history(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a history file as dictionaries; an unfinished last line and damaged ones are passed over.

    So is a version that comes again: an aggregator that hung may tell what its successor has made up for.
    """
    newest = 0
    for number, (_, line) in enumerate(scan_history(file), 1):
        is_version = line is not None and line.get("kind") == "version"
        if line is None or (is_version and not isinstance(line.get("version"), int)):
            log.warning("%s: line %d is damaged and passed over ('fedmq checkpoint verify' says more)", file, number)
        elif not is_version or line["version"] > newest:
            newest = line["version"] if is_version else newest
            yield line


def scan_history(file: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Where each finished line of a history file begins, in bytes, and what it says; None if it is damaged.

    Raises :class:`CheckpointError` if the file cannot be read.
    """
    try:
        if not file.exists():
            return
        with file.open("rb") as lines:
            start = 0
            for line in lines:
                if line.endswith(b"\n"):
                    yield start, next(_lines(line), None)
                start += len(line)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None


def version_line(record: VersionRecord) -> dict[str, Any]:
    """``record`` as the history has it."""
    line: dict[str, Any] = {
        "kind": "version",
        "version": record.version,
        "epoch": record.epoch,
        "time": round(record.time, 3),
        "seconds": round(record.seconds, 4),
        "loss": record.loss,
        "before": record.before,
        "after": record.after,
        "settings": dict(record.settings),
        "step": record.step,
        "updates": [_entry(entry) for entry in record.updates],
    }
    if record.folds:
        line["folds"] = [[count, dict(settings)] for count, settings in record.folds]
    if record.source is not None:
        line |= {"source": record.source, "dropped": [_entry(entry) for entry in record.dropped]}
    if record.without:
        line["without"] = list(record.without)
    return line


def version_record(line: Mapping[str, Any]) -> VersionRecord:
    """What :func:`version_line` was made from, but for rounded times.

    Raises :class:`CheckpointCorrupt` if a field is missing or of another kind.
    """
    values = {key: value for key, value in line.items() if key != "kind"}
    try:
        for key in ("updates", "dropped"):
            values[key] = [_entry_fields(entry) for entry in values.get(key, ())]
        return _RECORD.validate_python(values)
    except (TypeError, KeyError, AttributeError):
        raise CheckpointCorrupt(f"the line of version {line.get('version')!r} is damaged: no list of updates") from None
    except ValidationError as error:
        where, what = first_problem(error)
        raise CheckpointCorrupt(f"the line of version {line.get('version')!r} is damaged: {where}: {what}") from None


def _entry_fields(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The line's flat form of an entry as the nested one of :class:`Entry`."""
    known = {key: value for key, value in entry.items() if key not in _ID_FIELDS}
    return {**known, "id": {key: entry[key] for key in _ID_FIELDS}}


def _figure(line: Mapping[str, Any], key: str) -> float:
    """A number in ``line``; 0 if there is none, as in a line that was damaged."""
    value = line.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else 0


def _lines(content: bytes) -> Iterator[dict[str, Any]]:
    """Those lines in ``content`` that are JSON objects."""
    for line in content.splitlines():
        try:
            value = from_json(line)
        except ValueError:
            continue
        if isinstance(value, dict):
            yield value


def _entry(entry: Entry) -> dict[str, Any]:
    steps = {"steps": entry.steps, "seconds": entry.seconds} if entry.steps else {}
    return {
        "worker": entry.id.worker,
        "incarnation": entry.id.incarnation,
        "seq": entry.id.seq,
        "base_version": entry.base_version,
        "staleness": entry.staleness,
        "weight": entry.weight,
        "examples": entry.examples,
        "loss": entry.loss,
        **steps,
        **({} if entry.factor == 1.0 else {"factor": entry.factor}),
        **({} if entry.norm is None else {"norm": entry.norm}),
        "cosine": entry.cosine,
    }
