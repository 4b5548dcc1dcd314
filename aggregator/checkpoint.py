"""Durable snapshots. What the aggregator acknowledges is what stands in a file written here.

A checkpoint is one safetensors file, so that any tool of the field can open it. Tensors are named
``parameters/…``, ``optimizer/<slot>/…`` and ``accumulator/…``; everything else (ledger, epoch, partial round)
is JSON in the file's metadata, under the same checksum.

Written to a temporary file, synced, renamed, folder synced; the previous generation is kept. The folder's
``epoch`` file fences: only the aggregator that raised it last may rename a checkpoint into place.

We write the format ourselves, since the library's ``save_file`` neither syncs nor streams (it would hold a
second copy of the model); reading goes through the library.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import secrets
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import xxhash
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open

from aggregator.core.snapshot import Entry, Folds, Snapshot, VersionRecord, rolled_back
from aggregator.optimizers import OptimizerState
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
from broker.messages import DTYPES, Array, ModelSpec, Scalar, Tensors, as_bytes, parameters_digest

__all__ = ["CheckpointStore", "write_tensors"]

log = logging.getLogger("fedmq.checkpoint")

FORMAT = "fedmq-checkpoint-1"
#: The library's own limit.
MAX_HEADER = 100_000_000
KEEP = 2

_SAFETENSORS_DTYPES = {
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _State:
    """A snapshot without its arrays."""

    run: str
    model: ModelSpec
    epoch: int
    version: int
    digest: str
    optimizer_step: int
    optimizer_slots: tuple[str, ...]
    accumulator_share: float
    accumulator_weight: float
    accumulator_count: int
    entries: tuple[Entry, ...]
    ledger: dict[str, dict[str, list[list[int]]]]
    records: tuple[VersionRecord, ...]
    confirmed: dict[str, dict[str, int]]
    trainers: tuple[str, ...]
    rejected: dict[str, int]
    mode: str
    started: float
    done: bool
    # Not in the checkpoints of 0.1.
    void: tuple[tuple[int, int], ...] = ()
    changes: dict[str, Scalar] = field(default_factory=dict)
    pending: dict[str, Scalar] | None = None
    paused: bool = False
    commands: tuple[str, ...] = ()
    folds: Folds = ()
    kept_from: int | None = None


_ADAPTER: TypeAdapter[_State] = TypeAdapter(_State)
_SHARED = {f.name for f in fields(_State)} & {f.name for f in fields(Snapshot)}


class _Foreign(CheckpointCorrupt):
    """Whole, but not for this release: falling back behind it would drop what was acknowledged."""


class CheckpointStore:
    """The checkpoints of one run in one folder. One process at a time owns it, by epoch."""

    def __init__(self, folder: Path, run: str, *, keep: int = KEEP) -> None:
        """Nothing is touched yet. ``keep`` is how many generations stay, at least 2."""
        self.folder = folder
        self.run = run
        self._keep = max(KEEP, keep)

    # --------------------------------------------------------------------------------------------- reading

    def files(self) -> list[Path]:
        """Checkpoint files, newest first."""
        return sorted(self.folder.glob("[0-9]*.safetensors"), reverse=True)

    def load(self) -> Snapshot:
        """The newest snapshot that is whole.

        Raises:
            CheckpointMissing: there is none.
            CheckpointCorrupt: there are some, and none of them can be read.
            WrongRun: the folder holds another run's state.
        """
        return self._load()[0]

    def read(self, file: Path) -> Snapshot:
        """What stands in ``file``. Raises :class:`CheckpointCorrupt` and the like if it cannot be relied on."""
        return self._read(file)

    def _load(self) -> tuple[Snapshot, list[Path]]:
        """The newest snapshot that is whole, and the newer files that are not."""
        files = self.files()
        if not files:
            raise CheckpointMissing(
                f"no checkpoint of run {self.run!r} in {self.folder}: make the first with "
                f"'fedmq init --run {self.run} --task PACKAGE.MODULE:ATTRIBUTE', with the same --folder"
            )
        damaged: list[Path] = []
        problems: list[str] = []
        for file in files:
            try:
                snapshot = self._read(file)
            except _Foreign:
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

    def _read(self, file: Path) -> Snapshot:
        try:
            with safe_open(file, framework="np") as content:
                metadata = content.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise _Foreign(
                        f"{file}: format {metadata.get('format')!r}, this release reads {FORMAT!r}: upgrade fedmq"
                    )
                arrays = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
        except (SafetensorError, ValueError) as error:
            raise CheckpointCorrupt(f"{file} cannot be read: {error}") from None
        except OSError as error:
            # The disk or a right, not the file: an older generation must not take its place.
            raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None
        if metadata.get("checksum") != _checksum(metadata.get("state", ""), arrays):
            raise CheckpointCorrupt(f"{file}: the checksum does not match, the file was altered or damaged")
        try:
            state = _ADAPTER.validate_json(metadata["state"])
        except ValidationError as error:
            raise _Foreign(f"{file}: {error.error_count()} fields are not as this release expects") from None
        if state.run != self.run:
            raise WrongRun(f"{self.folder} holds run {state.run!r}, not {self.run!r}: choose another --folder")
        return _snapshot(state, arrays)

    # --------------------------------------------------------------------------------------------- writing

    def create(self, model: ModelSpec, parameters: Tensors, *, now: float) -> Snapshot:
        """Write the first checkpoint of a run: version 0, epoch 0, nothing folded.

        Raises:
            CheckpointError: there is one already.
            CheckpointNotWritten: it could not be made durable.
        """
        if self.files():
            raise CheckpointError(f"{self.folder} holds checkpoints already; a run is initialised once")
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
        self.write(snapshot)
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
            self.load()  # says what is missing, before anything is made in a folder that may be a typing error
        with self._locked():
            snapshot, damaged = self._load()
            known = max(self._stored_epoch(), snapshot.epoch)
            if (epoch > known or version > snapshot.version) and not (damaged or accept_older):
                raise CheckpointOutdated(
                    f"{self.folder} holds version {snapshot.version} (epoch {known}) of run {self.run!r}, and version "
                    f"{version} (epoch {epoch}) has been there: was an old copy restored, or is it another folder? "
                    "Start with the newest state, or give up what came after it with 'fedmq aggregator --accept-older'"
                )
            claimed = max(known, epoch) + 1
            self._store_epoch(claimed)
            for file in damaged:
                # Out of the way of KEEP, which would rather delete the whole one before it.
                with contextlib.suppress(OSError):
                    file.replace(file.with_name(f"{file.name}.damaged"))
        snapshot = replace(snapshot, epoch=claimed)
        if version > snapshot.version:
            log.error("version %d goes on as version %d; those in between are void", snapshot.version, version + 1)
            snapshot = rolled_back(
                snapshot,
                to=snapshot.version,
                head=version,
                parameters=snapshot.parameters,
                optimizer=snapshot.optimizer,
                now=now,
                drop=False,
            )
            self.write(snapshot)
        return snapshot

    def write(self, snapshot: Snapshot) -> Path:
        """Make ``snapshot`` durable; when this returns, it will survive a crash of this machine.

        Raises:
            StaleEpoch: another aggregator has claimed the run.
            CheckpointNotWritten: disk full, folder read-only and the like; the older checkpoints are untouched.
        """
        target = self._next_file()
        self._put(snapshot, target, epoch=snapshot.epoch)
        for old in self.files()[self._keep :]:
            with contextlib.suppress(OSError):
                old.unlink()
        return target

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
        self.load()  # says what is missing, before anything is made in a folder that may be a typing error
        with self._locked():
            snapshot, damaged = self._load()
            if damaged:
                raise CheckpointCorrupt(
                    f"{damaged[0]} is newer and damaged: start 'fedmq aggregator' first, which falls back behind it"
                )
            claimed = max(self._stored_epoch(), snapshot.epoch) + 1
            changed = change(replace(snapshot, epoch=claimed))
            self._store_epoch(claimed)
            self._put(changed, self._next_file())
        return changed

    def _put(self, snapshot: Snapshot, target: Path, *, epoch: int | None = None) -> None:
        arrays = _arrays(snapshot)
        state = _ADAPTER.dump_json(_state(snapshot)).decode()
        metadata = {"format": FORMAT, "state": state, "checksum": _checksum(state, arrays)}
        self._replace(target, lambda file: write_tensors(file, arrays, metadata), epoch=epoch)

    def _next_file(self) -> Path:
        number = max((int(file.stem) for file in self.files()), default=0) + 1
        return self.folder / f"{number:010d}.safetensors"

    def _store_epoch(self, epoch: int) -> None:
        self._replace(self.folder / "epoch", lambda file: file.write(f"{epoch}\n".encode()))

    def _replace(self, target: Path, write: Any, *, epoch: int | None = None) -> None:
        """Write ``target`` so that it is there whole and durable, or as it was before."""
        # A name that nobody else can have: a replaced aggregator must not write into what its successor renames,
        # and two containers on one folder often have the same process number.
        temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            with self._locked() if epoch is not None else contextlib.nullcontext():
                if epoch is not None:
                    self.require_epoch(epoch)
                temporary.replace(target)
                _sync_folder(target.parent)
        except OSError as error:
            raise CheckpointNotWritten(
                f"{target}: {error.strerror or error}; make room or make the folder writable"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def require_epoch(self, epoch: int) -> None:
        """Raise :class:`StaleEpoch` if another aggregator has claimed the run since ``epoch`` was."""
        stored = self._stored_epoch()
        if stored > epoch:
            raise StaleEpoch(
                f"another aggregator has taken over run {self.run!r} (epoch {stored}, this one has {epoch}); "
                "nothing of what it did is lost, this one stops"
            )

    def _stored_epoch(self) -> int:
        try:
            return int((self.folder / "epoch").read_text())
        except FileNotFoundError:
            return 0
        except (OSError, ValueError) as error:
            raise CheckpointCorrupt(f"{self.folder / 'epoch'}: {error}") from None

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Held while epochs are compared and files renamed, so that a claim cannot slip in between."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            handle = (self.folder / "lock").open("wb")
        except OSError as error:
            raise CheckpointNotWritten(f"{self.folder}: {error.strerror}; make the folder writable") from None
        with handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield


def write_tensors(file: BinaryIO, arrays: Tensors, metadata: Mapping[str, str]) -> None:
    """Write ``arrays`` to ``file`` in the safetensors format, without copying contiguous ones.

    Wider elements first, as the library does, so that each tensor is aligned to its element's size.
    """
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    position = 0
    for name in order:
        array = arrays[name]
        header[name] = {
            "dtype": _SAFETENSORS_DTYPES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + array.nbytes],
        }
        position += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        # Better nothing acknowledged than a file that the library refuses to read.
        raise CheckpointNotWritten(f"the run's state takes {len(text)} bytes; safetensors reads up to {MAX_HEADER}")
    file.write(struct.pack("<Q", len(text)))
    file.write(text)
    for name in order:
        file.write(as_bytes(arrays[name]))


def _checksum(state: str, arrays: Tensors) -> str:
    digest = xxhash.xxh3_128(state.encode())
    for name in sorted(arrays):
        digest.update(name.encode())
        digest.update(as_bytes(arrays[name]))
    return digest.hexdigest()


def _arrays(snapshot: Snapshot) -> dict[str, Array]:
    arrays = {f"parameters/{name}": array for name, array in snapshot.parameters.items()}
    for slot, tensors in snapshot.optimizer.slots.items():
        arrays |= {f"optimizer/{slot}/{name}": array for name, array in tensors.items()}
    if snapshot.accumulator.count:
        arrays |= {f"accumulator/{name}": array for name, array in snapshot.accumulator.tensors.items()}
    return arrays


def _state(snapshot: Snapshot) -> _State:
    return _State(
        **{name: getattr(snapshot, name) for name in _SHARED},
        optimizer_step=snapshot.optimizer.step,
        optimizer_slots=tuple(snapshot.optimizer.slots),
        accumulator_share=snapshot.accumulator.share,
        accumulator_weight=snapshot.accumulator.weight,
        accumulator_count=snapshot.accumulator.count,
    )


def _snapshot(state: _State, arrays: Mapping[str, Array]) -> Snapshot:
    def under(prefix: str) -> dict[str, Array]:
        return {n.removeprefix(prefix): np.asarray(a) for n, a in arrays.items() if n.startswith(prefix)}

    stored = under("parameters/")
    parameters = {t.name: stored[t.name].astype(DTYPES[t.dtype], copy=False) for t in state.model.tensors}
    for array in parameters.values():
        array.flags.writeable = False
    slots = {slot: under(f"optimizer/{slot}/") for slot in state.optimizer_slots}
    return Snapshot(
        **{name: getattr(state, name) for name in _SHARED},
        parameters=parameters,
        optimizer=OptimizerState(slots, state.optimizer_step),
        accumulator=Accumulator(
            tensors=under("accumulator/"),
            share=state.accumulator_share,
            weight=state.accumulator_weight,
            count=state.accumulator_count,
        ),
    )


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
