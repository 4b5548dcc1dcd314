"""A worker's identity and sequence on disk: why an update id is never given out twice.

The folder holds ``outbox.json`` and a lock. A number is durable before it is used; a crash in between skips
it, which costs nothing. If the file is lost or unreadable, a new incarnation begins, so that ids still differ.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import secrets
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten, WrongRun
from broker.messages import Count, Name, UpdateId, strict

__all__ = ["Outbox"]

log = logging.getLogger("fedmq.worker")

FORMAT = 1
FILE = "outbox.json"
LOCK = "outbox.lock"


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    format: Count
    run: Name
    worker: Name
    incarnation: Name
    next_seq: Count
    confirmed: Count


_adapter: TypeAdapter[_Content] = TypeAdapter(_Content)


class Outbox:
    """Gives out update ids. Open one with :meth:`open`; it holds the folder's lock until :meth:`close`."""

    def __init__(self, content: _Content, folder: Path | None, lock: int | None) -> None:
        self._content = content
        self._folder = folder
        self._lock = lock

    @classmethod
    def open(cls, folder: Path | None, run: str, worker: str) -> Outbox:
        """The outbox in ``folder``, made if there is none; with None, one in memory, of a new incarnation.

        Raises:
            WrongRun: the folder belongs to another run or worker.
            CheckpointCorrupt: it was written by a newer release.
            CheckpointNotWritten: it cannot be made or written.
            CheckpointError: another process uses it.
        """
        fresh = _Content(
            format=FORMAT, run=run, worker=worker, incarnation=secrets.token_hex(6), next_seq=0, confirmed=0
        )
        if folder is None:
            return cls(fresh, None, None)
        lock = _locked(folder, worker)
        try:
            found = _read(folder / FILE)
            if found is not None and (found.run, found.worker) != (run, worker):
                raise WrongRun(
                    f"{folder} belongs to worker {found.worker!r} of run {found.run!r}, not to worker {worker!r} of "
                    f"run {run!r}: give every worker and run its own folder ([worker] folder), or remove this one"
                )
            outbox = cls(found or fresh, folder, lock)
            outbox._save()
        except CheckpointError:
            os.close(lock)
            raise
        return outbox

    @property
    def incarnation(self) -> str:
        """The name of this life of the folder."""
        return self._content.incarnation

    @property
    def confirmed(self) -> int:
        """Updates of this incarnation that the broker confirmed, as far as this folder has heard."""
        return self._content.confirmed

    def next_id(self) -> UpdateId:
        """A new id, never given out before and never again: durable before this returns.

        Raises :class:`CheckpointNotWritten` if it cannot be made durable; the id is then not used.
        """
        content = self._content
        self._content = replace(content, next_seq=content.next_seq + 1)
        self._save()
        return UpdateId(content.worker, content.incarnation, content.next_seq)

    def confirm(self, update: UpdateId) -> None:
        """Note that the broker has ``update``. For people who look: it is written with the next id only."""
        if update.incarnation == self.incarnation:
            self._content = replace(self._content, confirmed=self._content.confirmed + 1)

    def close(self) -> None:
        """Write what is noted and let go of the folder."""
        if self._lock is None:
            return
        try:
            self._save()
        except CheckpointNotWritten as error:
            log.warning("%s", error)
        os.close(self._lock)
        self._lock = None

    def _save(self) -> None:
        if self._folder is not None:
            _write(self._folder / FILE, json.dumps(asdict(self._content), indent=1).encode())


def _locked(folder: Path, worker: str) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise CheckpointNotWritten(f"{folder}: a worker must be able to write there: {error.strerror}") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise CheckpointError(
            f"{folder} is in use: another process runs as worker {worker!r}. Give this one another name "
            "(--name) and with it another folder, or stop the other"
        ) from None
    return lock


def _read(path: Path) -> _Content | None:
    """The content of ``path``, or None if there is none that can be believed."""
    try:
        values: Any = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        values = None
    if isinstance(values, dict) and isinstance(values.get("format"), int) and values["format"] > FORMAT:
        raise CheckpointCorrupt(f"{path} was written by a newer release of fedmq (format {values['format']})")
    try:
        return _adapter.validate_python(values)
    except ValidationError:
        log.warning("%s is damaged: beginning a new incarnation, so that no update id comes twice", path)
        return None


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        # The rename itself must survive a power cut, and that stands in the folder.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointNotWritten(f"{path}: an update id could not be made durable: {error.strerror}") from None
