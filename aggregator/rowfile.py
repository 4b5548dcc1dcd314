"""Rows on disk: what a strategy that needs all updates of a round has of them, one file a round and aggregator.

    magic | dtype | elements | model | checksum of these      64 bytes
    row | row | row …                                         each elements x 4 or 8 bytes, little-endian

A row is written when its update arrives, and never again. How many rows count, and what their checksums are, stands
in the checkpoint that covers them (:class:`RowPart`): whatever else is at the end of the file, whole or torn, was
never acknowledged. Nobody appends to a file of another aggregator, which may hang and yet live: who takes over reads
it, and goes on in a file of its own.

Files are read in pieces and not mapped, so that memory holds what is asked for and no more.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import struct
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from aggregator.disk import make_folder, sync_folder
from aggregator.strategies.rows import row_shape
from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten
from broker.messages import Array, ModelSpec, as_bytes

__all__ = ["RowFile", "RowPart", "StoredRows", "copy_rows", "open_rows"]

MAGIC = b"FEDMQROW"
VERSION = 1
HEAD = struct.Struct("<8sI4sQ32sQ")

#: Elements that are widened together: they stay in the processor's cache.
_PIECE = 1 << 18
#: Bytes that are read together to be checked or copied.
_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class RowPart:
    """Rows of one file, as a checkpoint refers to them."""

    file: str
    """Its name, in the folder of the checkpoint."""
    sums: tuple[str, ...]
    """XXH3-128 of each row that counts, in order."""


class RowFile:
    """One file of rows. Rows may be added on one thread while others are read or made durable on another."""

    def __init__(self, path: Path, model: ModelSpec, handle: int, *, is_ours: bool) -> None:
        """``handle`` is open, and this object's from here on; see :meth:`create` and :meth:`open`."""
        self.path = path
        self.size, self.dtype = row_shape(model)
        self._handle = handle
        self._lock = threading.Lock()
        self._sums: list[str] = []
        self._durable = 0
        self._is_ours, self._is_named, self._is_doubtful = is_ours, False, False
        weakref.finalize(self, os.close, handle)

    @classmethod
    def create(cls, path: Path, model: ModelSpec) -> RowFile:
        """A new file, to be written. Raises :class:`FileExistsError` and :class:`CheckpointNotWritten`."""
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except FileExistsError:
            raise
        except OSError as error:
            raise _not_written(path, error) from None
        made = cls(path, model, handle, is_ours=True)
        try:
            _write(handle, _head(model), 0)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise _not_written(path, error) from None
        return made

    @classmethod
    def open(cls, path: Path, model: ModelSpec) -> RowFile:
        """A file that is there, to be read.

        Raises:
            FileNotFoundError: it is not.
            CheckpointCorrupt: it is damaged, or has rows of another model.
            CheckpointError: the disk, or a right, does not let it be read.
        """
        try:
            handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            found = cls(path, model, handle, is_ours=False)
            head = os.pread(handle, HEAD.size, 0)
        except FileNotFoundError:
            raise
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
        if head != _head(model):
            raise CheckpointCorrupt(f"{path}: its beginning is damaged, or it has rows of another model")
        return found

    def append(self, values: Iterable[Array]) -> str:
        """Add a row, which is not durable yet; its checksum.

        Raises :class:`ValueError` and :class:`CheckpointNotWritten`; nothing was added then.
        """
        start = place = self._place(len(self._sums))
        end = start + self.size * self.dtype.itemsize
        checksum = xxhash.xxh3_128()
        try:
            for piece in values:
                for view in _views(piece, self.dtype):
                    if place + view.nbytes > end:
                        raise ValueError(f"a row has {self.size} elements, and there are more")
                    checksum.update(view)
                    _write(self._handle, view, place)
                    place += view.nbytes
        except OSError as error:
            with contextlib.suppress(OSError):
                # What there was room for would take it from the checkpoints.
                os.ftruncate(self._handle, start)
            raise _not_written(self.path, error) from None
        if place != end:
            raise ValueError(f"a row has {self.size} elements, and there are {(place - start) // self.dtype.itemsize}")
        with self._lock:
            self._sums.append(checksum.hexdigest())
        return self._sums[-1]

    def sync(self) -> None:
        """Make all rows durable that have been added; those of a file that is only read are.

        Raises :class:`CheckpointNotWritten`, and :class:`CheckpointCorrupt` if the disk has lost what it took.
        """
        with self._lock:
            sums, is_doubtful = tuple(self._sums), self._is_doubtful
        if not self._is_ours or (self._is_named and self._durable == len(sums) and not is_doubtful):
            return
        self._is_doubtful = True
        try:
            if is_doubtful:
                self._write_again(sums)
            os.fsync(self._handle)
            if not self._is_named:
                sync_folder(self.path.parent)
                self._is_named = True
        except OSError as error:
            raise _not_written(self.path, error) from None
        self._durable, self._is_doubtful = len(sums), False

    def read(self, index: int, start: int, out: Array) -> None:
        """Fill ``out``, flat and of the file's dtype, with the elements of row ``index`` from ``start`` on.

        Raises :class:`CheckpointCorrupt` if the file ends before, :class:`CheckpointError` if it cannot be read.
        """
        place, rest = self._place(index) + start * self.dtype.itemsize, as_bytes(out)
        try:
            while rest:
                count = os.preadv(self._handle, [rest], place)
                if not count:
                    raise CheckpointCorrupt(f"{self.path} ends within row {index}")
                place, rest = place + count, rest[count:]
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror or error}") from None

    def check(self, sums: Sequence[str]) -> None:
        """Read the rows that ``sums`` are of. Raises as :meth:`read`, also if one is not the row that was written."""
        for index, expected in enumerate(sums):
            if self._sum(index) != expected:
                raise CheckpointCorrupt(f"{self.path}: row {index} does not match its checksum, the file was damaged")

    def pieces(self, index: int) -> Iterator[Array]:
        """Row ``index`` as it was written, in pieces, each valid until the next. Raises as :meth:`read`."""
        room = np.empty(min(_BYTES // self.dtype.itemsize, self.size), self.dtype)
        for start in range(0, self.size, max(1, room.size)):
            piece = room[: self.size - start]
            self.read(index, start, piece)
            yield piece

    def _sum(self, index: int) -> str:
        checksum = xxhash.xxh3_128()
        for piece in self.pieces(index):
            checksum.update(as_bytes(piece))
        return checksum.hexdigest()

    def _write_again(self, sums: Sequence[str]) -> None:
        """After a failed fsync the system may call clean what the disk does not have: all since the last good one."""
        for index in range(self._durable, len(sums)):
            if self._sum(index) != sums[index]:
                raise CheckpointCorrupt(
                    f"{self.path}: the disk has lost row {index}, which was not acknowledged. Look after the disk, and "
                    "start again"
                )
            place = self._place(index)
            for piece in self.pieces(index):
                _write(self._handle, as_bytes(piece), place)
                place += piece.nbytes

    def _place(self, index: int) -> int:
        return HEAD.size + index * self.size * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredRows:
    """Rows in files: a value, which stays as it is when more are added. See :mod:`aggregator.strategies.rows`."""

    model: ModelSpec
    size: int
    dtype: np.dtype[Any]
    weights: tuple[float, ...] = ()
    workers: tuple[str, ...] = ()
    parts: tuple[tuple[RowFile, tuple[str, ...]], ...] = ()
    """Files, and the checksums of their rows that are meant."""

    @property
    def count(self) -> int:
        """Rows."""
        return len(self.weights)

    def block(self, start: int, stop: int) -> Array:
        """See :class:`aggregator.strategies.rows.Rows`. Raises :class:`CheckpointError`."""
        start, stop, _ = slice(start, stop).indices(self.size)
        block = np.empty((self.count, max(0, stop - start)), self.dtype)
        row = 0
        for file, sums in self.parts:
            for index in range(len(sums)):
                file.read(index, start, block[row])
                row += 1
        for line, weight in zip(block, self.weights, strict=True):
            if weight != 1.0:
                np.multiply(line, weight, out=line, dtype=self.dtype)
        return block

    def row(self, index: int) -> Array:
        """See :class:`aggregator.strategies.rows.Rows`. Raises :class:`CheckpointError`."""
        row, rest = np.empty(self.size, self.dtype), range(self.count)[index]
        for file, sums in self.parts:
            if rest < len(sums):
                file.read(rest, 0, row)
                break
            rest -= len(sums)
        return np.multiply(row, self.weights[index], out=row, dtype=self.dtype)

    def sync(self) -> None:
        """Make them durable. Raises as :meth:`RowFile.sync`."""
        for file, _ in self.parts:
            file.sync()

    def refer(self) -> tuple[RowPart, ...]:
        """How a checkpoint beside the files refers to them."""
        return tuple(RowPart(file.path.name, sums) for file, sums in self.parts)


def open_rows(
    folder: Path, model: ModelSpec, parts: Iterable[RowPart], weights: Iterable[float], workers: Iterable[str]
) -> StoredRows:
    """The rows that a checkpoint in ``folder`` refers to, each checked.

    Args:
        folder: where the files are.
        model: the run's.
        parts: what the checkpoint says.
        weights: of each row.
        workers: of each row.

    Raises as :meth:`RowFile.open` and :meth:`RowFile.check`, and :class:`CheckpointCorrupt` if there are more or fewer
    rows than weights.
    """
    found = []
    for part in parts:
        if Path(part.file).name != part.file:
            raise CheckpointCorrupt(f"{folder}: {part.file!r} is no name of a file of rows")
        file = RowFile.open(folder / part.file, model)
        file.check(part.sums)
        found.append((file, part.sums))
    rows = StoredRows(model, *row_shape(model), tuple(weights), tuple(workers), tuple(found))
    if sum(len(sums) for _, sums in found) != rows.count:
        raise CheckpointCorrupt(f"{folder}: the checkpoint refers to more or fewer rows than it lists updates")
    return rows


def copy_rows(rows: StoredRows, target: Path) -> tuple[RowPart, ...]:
    """Write ``rows`` into ``target``, durably, and say how a checkpoint beside it refers to them.

    Raises :class:`CheckpointNotWritten`, and as :meth:`RowFile.read`.
    """
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        make_folder(target.parent)
        copy = RowFile.create(temporary, rows.model)
        for file, sums in rows.parts:
            for index, expected in enumerate(sums):
                if copy.append(file.pieces(index)) != expected:
                    raise CheckpointCorrupt(f"{file.path}: row {index} does not match its checksum")
        copy.sync()
        temporary.replace(target)
    except OSError as error:
        raise _not_written(target, error) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return (RowPart(target.name, tuple(text for _, sums in rows.parts for text in sums)),)


def _head(model: ModelSpec) -> bytes:
    size, dtype = row_shape(model)
    fields = MAGIC, VERSION, dtype.str[1:].encode(), size, bytes.fromhex(model.digest)
    return HEAD.pack(*fields, xxhash.xxh3_64_intdigest(HEAD.pack(*fields, 0)))


def _views(piece: Array, dtype: np.dtype[Any]) -> Iterator[memoryview]:
    """The bytes of ``piece``, which is flat, in ``dtype``; each is valid until the next."""
    if piece.dtype == dtype:
        yield as_bytes(piece)
        return
    room = np.empty(min(_PIECE, piece.size), dtype)
    for start in range(0, piece.size, _PIECE):
        part = piece[start : start + _PIECE]
        room[: part.size] = part
        yield as_bytes(room[: part.size])


def _write(handle: int, content: bytes | memoryview, place: int) -> None:
    rest = memoryview(content)
    while rest:
        count = os.pwrite(handle, rest, place)
        place, rest = place + count, rest[count:]


def _not_written(path: Path, error: OSError) -> CheckpointNotWritten:
    return CheckpointNotWritten(f"{path}: {error.strerror or error}; make room or make the folder writable")
