"""A worker's identity and sequence on disk: why an update id is never given out twice.

Each opening begins a new incarnation, so that not even a folder that is restored from an old copy, or copied to
another machine, can repeat an id. The folder holds ``outbox.json`` and a lock. A number is durable before it is
used, so that the file names every id that may be on its way; a crash in between skips one, which costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten, WrongRun
from broker.jsontext import from_json
from broker.messages import Name, UpdateId
from broker.model import Count, strict

__all__ = ["Outbox"]

log = logging.getLogger("fedmq.worker")

FORMAT = 1
FILE = "outbox.json"
LOCK = "outbox.lock"
#: Former incarnations that are remembered: a worker may be started often while the broker is away.
MOST_FORMER = 100


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    format: Count
    run: Name
    worker: Name
    incarnation: Name
    next_seq: Count
    confirmed: Count
    former: Mapping[Name, Count] = field(default_factory=dict)
    """Confirmed updates of the incarnations before, as long as the aggregator may not have heard."""


_adapter: TypeAdapter[_Content] = TypeAdapter(_Content)


class Outbox:
    """Gives out update ids. Open one with :meth:`open`; it holds the folder's lock until :meth:`close`."""

    def __init__(self, content: _Content, folder: Path | None, lock: int | None) -> None:
        self._content = content
        self._folder = folder
        self._lock = lock

    @classmethod
    def open(cls, folder: Path | None, run: str, worker: str) -> Outbox:
        """A new incarnation in ``folder``, which is made if there is none; with None, one in memory.

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
            outbox = cls(replace(fresh, former=_former(found)), folder, lock)
            outbox._save()
        except CheckpointError:
            os.close(lock)
            raise
        return outbox

    @property
    def incarnation(self) -> str:
        """The name of this life of the worker."""
        return self._content.incarnation

    @property
    def former(self) -> Mapping[str, int]:
        """Confirmed updates by incarnation, of those before this one that may not have said how many."""
        return self._content.former

    def told(self, incarnations: Iterable[str]) -> None:
        """The broker has what is to be said of these former ``incarnations``: they are forgotten here."""
        told = set(incarnations)
        self._content = replace(self._content, former={k: n for k, n in self.former.items() if k not in told})

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
        """Note that the broker has ``update``. For people who look, and nothing depends on it."""
        if update.incarnation == self.incarnation:
            self._content = replace(self._content, confirmed=self._content.confirmed + 1)
            with contextlib.suppress(CheckpointNotWritten):  # the next id meets it, and cannot do without
                self._save(durable=False)

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

    def _save(self, *, durable: bool = True) -> None:
        if self._folder is not None:
            _write(self._folder / FILE, json.dumps(asdict(self._content), indent=1).encode(), durable=durable)


def _former(found: _Content | None) -> Mapping[str, int]:
    """What the incarnation that ``found`` is of would have to say of itself and of those before it."""
    if found is None:
        return {}
    counts = {**found.former, found.incarnation: found.confirmed}
    return {name: count for name, count in list(counts.items())[-MOST_FORMER:] if count}


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
        values: Any = from_json(path.read_bytes())
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
        log.warning("%s is damaged; how many updates were confirmed before is not known any more", path)
        return None


def _write(path: Path, content: bytes, *, durable: bool) -> None:
    temporary = path.with_suffix(".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        temporary.replace(path)
        if not durable:
            return
        # The rename itself must survive a power cut, and that stands in the folder.
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise CheckpointNotWritten(f"{path}: an update id could not be made durable: {error.strerror}") from None
