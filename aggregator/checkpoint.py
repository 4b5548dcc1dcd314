"""Durable snapshots. What the aggregator acknowledges is what stands in a file written here.

Written to a temporary file, synced, renamed, folder synced; the previous generation is kept. The folder's
``epoch`` file fences: only the aggregator that raised it last may rename a checkpoint into place. What such a file
looks like is in :mod:`aggregator.checkpointfile`.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from aggregator.checkpointfile import ForeignCheckpoint, contents, read_checkpoint, read_head, row_files, write_tensors
from aggregator.core.snapshot import Snapshot, SnapshotHead, rolled_back
from aggregator.disk import make_folder, sync_folder
from aggregator.optimizers import OptimizerState
from aggregator.rowfile import RowPart, StoredRows, copy_rows
from aggregator.strategies.base import Accumulator
from broker.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMissing,
    CheckpointNotWritten,
    CheckpointOutdated,
    StaleEpoch,
    WrongRun,
)
from broker.messages import ModelSpec, Tensors, parameters_digest

__all__ = ["CheckpointStore", "write_tensors"]

log = logging.getLogger("fedmq.checkpoint")

KEEP = 2
#: How often reading begins anew because a file was deleted meanwhile, as each newer one makes the oldest be.
RELOADS = 20
#: The lock is held for milliseconds, unless its holder hangs.
LOCK_SECONDS = 30.0
LOCK_PAUSE = 0.01


Read = TypeVar("Read", bound=SnapshotHead)


class CheckpointStore:
    """The checkpoints of one run in one folder. One process at a time owns it, by epoch."""

    def __init__(self, folder: Path, run: str, *, keep: int = KEEP) -> None:
        """Nothing is touched yet. ``keep`` is how many generations stay, at least 2."""
        self.folder = folder
        self.run = run
        self._keep = max(KEEP, keep)
        self._row_files: dict[Path, frozenset[str]] = {}

    # --------------------------------------------------------------------------------------------- reading

    def files(self) -> list[Path]:
        """Checkpoint files, newest first."""
        found = self.folder.glob("[0-9]*.safetensors")
        # What an operator has put beside them (a copy, a backup) is none.
        return sorted((file for file in found if re.fullmatch("[0-9]+", file.stem)), key=_number, reverse=True)

    def load(self) -> Snapshot:
        """The newest snapshot that is whole.

        Raises:
            CheckpointMissing: there is none.
            CheckpointCorrupt: there are some, and none of them can be read.
            WrongRun: the folder holds another run's state.
        """
        return self._load()[0]

    def head(self) -> SnapshotHead:
        """The newest snapshot without its arrays, in a moment whatever the model's size. Raises as :meth:`load`.

        Enough to look at a run, not to go on with it: tensors are not read, so damage in them goes unnoticed, and
        where :meth:`load` would fall back behind a file, this may tell what stands in it.
        """
        return self._newest(read_head)[0]

    def read(self, file: Path) -> Snapshot:
        """What stands in ``file``.

        Raises :class:`CheckpointCorrupt` and the like if it cannot be relied on, :class:`WrongRun` if it is of
        another run.
        """
        return self._ours(file, read_checkpoint(file))

    def _ours(self, file: Path, found: Read) -> Read:
        if found.run != self.run:
            raise WrongRun(f"{file.parent} holds run {found.run!r}, not {self.run!r}: choose another --folder")
        return found

    def _load(self) -> tuple[Snapshot, list[Path]]:
        """The newest snapshot that is whole, and the newer files that are not."""
        return self._newest(read_checkpoint)

    def _newest(self, read: Callable[[Path], Read]) -> tuple[Read, list[Path]]:
        for _ in range(RELOADS):
            files = self.files()
            try:
                return self._newest_whole(files, read)
            except CheckpointError:
                if all(file.exists() for file in files):
                    raise
        raise CheckpointError(f"{self.folder}: its files vanish while they are read; is somebody deleting them?")

    def _newest_whole(self, files: list[Path], read: Callable[[Path], Read]) -> tuple[Read, list[Path]]:
        if not files:
            raise CheckpointMissing(
                f"no checkpoint of run {self.run!r} in {self.folder}: make the first with "
                f"'fedmq init --run {self.run} --task PACKAGE.MODULE:ATTRIBUTE', with the same --folder"
            )
        damaged: list[Path] = []
        problems: list[str] = []
        for file in files:
            try:
                snapshot = self._ours(file, read(file))
            except ForeignCheckpoint:
                raise
            except CheckpointCorrupt as error:
                damaged.append(file)
                problems.append(str(error))
                continue
            if problems:
                log.error(
                    "%s; falling back to %s (version %d): updates acknowledged after it are not in the model",
                    "; ".join(problems),
                    file.name,
                    snapshot.version,
                )
            return snapshot, damaged
        raise CheckpointCorrupt(
            "; ".join(problems) + ": restore one from a backup, or move the folder away to start anew"
        )

    # --------------------------------------------------------------------------------------------- writing

    def create(self, model: ModelSpec, parameters: Tensors, *, now: float) -> Snapshot:
        """Write the first checkpoint of a run: version 0, epoch 0, nothing folded.

        Raises:
            CheckpointError: there is one already.
            CheckpointNotWritten: it could not be made durable.
        """
        snapshot = Snapshot(
            run=self.run,
            model=model,
            epoch=0,
            version=0,
            parameters=parameters,
            digest=parameters_digest(parameters),
            optimizer=OptimizerState({}),
            accumulator=Accumulator(),
            started=now,
        )
        with self._locked():
            if self.files():
                raise CheckpointError(f"{self.folder} holds checkpoints already; a run is initialised once")
            self.require_epoch(snapshot.epoch)
            self._put(snapshot, self._next_file())
        return snapshot

    def claim(self, *, epoch: int = 0, version: int = 0, now: float = 0.0, accept_older: bool = False) -> Snapshot:
        """Load the newest snapshot and own the run from now on, under an epoch higher than any before.

        Whoever owned it before can write no more. If the state is older than what was seen of the run, its
        version becomes the newest under a number of its own (:func:`rolled_back`), durable before this returns.

        Args:
            epoch: the highest that anybody has seen, apart from this folder.
            version: the newest that anybody has seen, apart from this folder.
            now: seconds since 1970.
            accept_older: take the state even if it is older than that.

        Raises what :meth:`load` raises, and:
            CheckpointOutdated: the state is older, and no damaged file explains that.
            CheckpointNotWritten: the epoch cannot be made durable.
        """
        if not self.files():
            self.head()  # says what is missing, before anything is made in a folder that may be a typing error
        with self._locked():
            snapshot, damaged = self._load()
            known = max(self.stored_epoch(), snapshot.epoch)
            if (epoch > known or version > snapshot.version) and not (damaged or accept_older):
                raise CheckpointOutdated(
                    f"{self.folder} holds version {snapshot.version} (epoch {known}) of run {self.run!r}, and version "
                    f"{version} (epoch {epoch}) has been there: was an old copy restored, or is it another folder? "
                    "Start with the newest state, or give up what came after it with 'fedmq aggregator --accept-older'"
                )
            claimed = max(known, epoch) + 1
            self._store_epoch(claimed)
            self._remove_torsos()
            self._row_files.clear()
        snapshot = replace(snapshot, epoch=claimed)
        if version > snapshot.version:
            level = logging.WARNING if accept_older else logging.ERROR
            log.log(level, "version %d goes on as version %d; those between are void", snapshot.version, version + 1)
            snapshot = rolled_back(
                snapshot,
                to=snapshot.version,
                head=version,
                parameters=snapshot.parameters,
                optimizer=snapshot.optimizer,
                now=now,
                drop=False,
            )
            self._put(snapshot, self._next_file(), epoch=snapshot.epoch)
        for file in damaged:
            # Out of the way of KEEP, which would rather delete the whole one before it. Not earlier: as long as the
            # new number is not durable, it must be seen why the state is older than what the run has told.
            with contextlib.suppress(OSError):
                file.replace(file.with_name(f"{file.name}.damaged"))
        return snapshot

    def write(
        self,
        snapshot: Snapshot,
        copied: Callable[[], None] | None = None,
        first: Callable[[], None] | None = None,
    ) -> Path:
        """Make ``snapshot`` durable; when this returns, it will survive a crash of this machine.

        Args:
            snapshot: its arrays are read until this returns or raises.
            copied: called as soon as the accumulator is not read any more, long before it is durable. Not called if
                there is no update in it, or if something fails before.
            first: called when all is written and synced, before it counts. If it raises, nothing has changed.

        Raises:
            StaleEpoch: another aggregator has claimed the run.
            CheckpointNotWritten: disk full, folder read-only and the like; the older checkpoints are untouched.
        """
        target = self._next_file()
        self._put(snapshot, target, epoch=snapshot.epoch, copied=copied, first=first)
        for old in self.files()[self._keep :]:
            with contextlib.suppress(OSError):
                old.unlink()
        return target

    def _remove_torsos(self) -> None:
        """Delete what writers left behind that were killed. Whoever writes yet, under an older epoch, may not."""
        for file in [*self.folder.glob(".*.safetensors.*"), *self.folder.glob(".epoch.*")]:
            with contextlib.suppress(OSError):
                file.unlink()

    def save(self, snapshot: Snapshot, target: Path) -> None:
        """Make ``snapshot`` durable in a file of its own, which nothing deletes. Raises as :meth:`write`."""
        self._put(snapshot, target, epoch=snapshot.epoch)

    def supersede(self, change: Callable[[Snapshot], Snapshot]) -> Snapshot:
        """Put what ``change`` makes of the newest snapshot in its place, as one step, under a new epoch.

        Whoever owns the run waits meanwhile, and can then write no more. All older checkpoints stay. If
        ``change`` raises, nothing has happened.

        Raises what :meth:`load` and :meth:`write` raise, and :class:`CheckpointCorrupt` if there is something
        newer that cannot be read.
        """
        self.head()  # says what is missing, before anything is made in a folder that may be a typing error
        with self._locked():
            snapshot, damaged = self._load()
            if damaged:
                raise CheckpointCorrupt(
                    f"{damaged[0]} is newer and damaged: start 'fedmq aggregator' first, which falls back behind it"
                )
            claimed = max(self.stored_epoch(), snapshot.epoch) + 1
            changed = change(replace(snapshot, epoch=claimed))
            # Late, so that whoever owns the run goes on until then, and its successor does not wait for a large file.
            self._put(changed, self._next_file(), first=lambda: self._store_epoch(claimed))
        return changed

    def _put(
        self,
        snapshot: Snapshot,
        target: Path,
        *,
        epoch: int | None = None,
        first: Callable[[], None] | None = None,
        copied: Callable[[], None] | None = None,
    ) -> None:
        rows = self._keep_rows(snapshot, target)
        arrays, metadata = contents(snapshot, rows)
        self._replace(target, lambda file: write_tensors(file, arrays, metadata, copied), epoch=epoch, first=first)
        self._row_files[target] = frozenset(part.file for part in rows or ())

    def _keep_rows(self, snapshot: Snapshot, target: Path) -> tuple[RowPart, ...] | None:
        """Make the rows of the open round, if there are any, durable; how ``target`` is to refer to them."""
        rows = snapshot.accumulator.rows
        if rows is None:
            return None
        if not isinstance(rows, StoredRows):
            raise TypeError(f"a checkpoint refers to rows on disk, and these are {type(rows).__name__}")
        if target.parent != self.folder:
            return copy_rows(rows, target.with_suffix(".rows"))
        rows.sync()
        return rows.refer()

    def needed_rows(self) -> frozenset[str] | None:
        """Names of the files of rows that the checkpoints refer to; None if one of these cannot be read now."""
        known = self._row_files
        try:
            # What was written or read before does not change.
            self._row_files = {file: known[file] if file in known else row_files(file) for file in self.files()}
        except CheckpointError:
            return None
        return frozenset().union(*self._row_files.values())

    def _next_file(self) -> Path:
        number = max(map(_number, self.files()), default=0) + 1
        return self.folder / f"{number:010d}.safetensors"

    def _store_epoch(self, epoch: int) -> None:
        self._replace(self.folder / "epoch", lambda file: file.write(f"{epoch}\n".encode()))

    def _replace(
        self, target: Path, write: Any, *, epoch: int | None = None, first: Callable[[], None] | None = None
    ) -> None:
        """Write ``target`` so that it is there whole and durable, or as it was before.

        ``first`` is done when all is written, and before it has its name.
        """
        # A name that nobody else can have: a replaced aggregator must not write into what its successor renames,
        # and two containers on one folder often have the same process number.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            make_folder(target.parent)
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            with self._locked() if epoch is not None else contextlib.nullcontext():
                if epoch is not None:
                    self.require_epoch(epoch)
                if first is not None:
                    first()
                temporary.replace(target)
                sync_folder(target.parent)
        except OSError as error:
            raise CheckpointNotWritten(
                f"{target}: {error.strerror or error}; make room or make the folder writable"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def require_epoch(self, epoch: int) -> None:
        """Raise :class:`StaleEpoch` if another aggregator has claimed the run since ``epoch`` was."""
        stored = self.stored_epoch()
        if stored > epoch:
            raise StaleEpoch(
                f"another aggregator, or a command, has taken over run {self.run!r} (epoch {stored}, this one has "
                f"{epoch}); nothing of what it did is lost"
            )

    def stored_epoch(self) -> int:
        """The highest epoch that was claimed here; 0 if the file is not there.

        Raises :class:`CheckpointCorrupt` if it holds no number, :class:`CheckpointNotWritten` if it cannot be read.
        """
        file = self.folder / "epoch"
        try:
            return int(file.read_bytes())
        except FileNotFoundError:
            return 0
        except ValueError:
            raise CheckpointCorrupt(
                f"{file} is damaged: it holds the number of the run's newest aggregator. Stop all aggregators of run "
                f"{self.run!r}, delete the file, and start one, with --accept-older if it asks for that"
            ) from None
        except OSError as error:
            raise CheckpointNotWritten(f"{file} cannot be read: {error.strerror or error}") from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Held while epochs are compared and files renamed, so that a claim cannot slip in between.

        Raises :class:`CheckpointNotWritten`, also if whoever holds it hangs.
        """
        file = self.folder / "lock"
        try:
            make_folder(self.folder)
            # Unbuffered and never written to: nothing that a full disk could refuse.
            handle = file.open("ab", buffering=0)
        except OSError as error:
            raise CheckpointNotWritten(f"{self.folder}: {error.strerror}; make the folder writable") from None
        with handle:
            deadline = time.monotonic() + LOCK_SECONDS
            while not _lock(handle.fileno(), file):
                if time.monotonic() > deadline:
                    raise CheckpointNotWritten(
                        f"{file} has been held for {LOCK_SECONDS:g} s by another process, which hangs: look for a "
                        f"stopped aggregator of run {self.run!r} and kill it"
                    )
                time.sleep(LOCK_PAUSE)
            yield


def _lock(handle: int, file: Path) -> bool:
    """Whether the lock was free, and is ours now."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise CheckpointNotWritten(
            f"{file}: {error.strerror}; checkpoints need a file system with flock: a local disk, NFS 4, CephFS"
        ) from None
    return True


def _number(file: Path) -> int:
    return int(file.stem)
