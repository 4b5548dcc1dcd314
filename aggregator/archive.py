"""Every applied update on disk, if ``keep_updates`` is set: what ``fedmq replay`` rebuilds versions from.

One file for each epoch, ``<epoch>.log``, of records ``length | checksum | message``: two little-endian
64-bit numbers, the second the XXH3-64 of the message, and the message as the worker sent it. A record is durable
before the checkpoint that covers its update is written. After a crash an update may stand there twice, under the
same id and with the same bytes; a torn record at a file's end is of an update that was never acknowledged.

``base-<version>.safetensors`` beside them are checkpoints: the state from which on all updates were kept.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import BinaryIO

import xxhash
from pydantic import TypeAdapter, ValidationError

from aggregator.disk import make_folder, sync_folder, write_all
from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten, LineageError, WireError
from broker.messages import UpdateId
from broker.wire.envelope import MAX_HEADER, PREFIX, unpack
from broker.wire.sealed import SEAL_BYTES

__all__ = ["KeptUpdates", "UpdateArchive", "base_file"]

Buffer = bytes | memoryview

HEAD = struct.Struct("<QQ")
#: Bytes that a check reads at once.
PIECE = 1 << 20

#: Where a record begins takes one number: the file's epoch, and so many bits for the position in it.
_OFFSET_BITS = 48

_ID: TypeAdapter[UpdateId] = TypeAdapter(UpdateId)


class UpdateArchive:
    """The file of one epoch. ``add`` and ``sync`` may be called from different threads."""

    def __init__(self, folder: Path, epoch: int) -> None:
        """Raises :class:`CheckpointNotWritten` if the file cannot be made."""
        self.file = folder / _name(epoch)
        self._lock = threading.Lock()
        self._late: list[Sequence[Buffer]] = []
        self._end = self._durable = 0
        self._is_doubtful = False
        try:
            make_folder(folder)
            self._out: FileIO = self.file.open("x+b", buffering=0)
            sync_folder(folder)
        except FileExistsError:
            raise CheckpointNotWritten(
                f"{self.file} is there already: the run's epoch has fallen, as when checkpoints are restored without "
                "the file 'epoch' and without the history; start again, which takes the next number"
            ) from None
        except OSError as error:
            raise CheckpointNotWritten(f"{self.file}: {error.strerror}; make the folder writable") from None

    def add(self, *parts: Buffer) -> None:
        """Keep the message that ``parts`` make. If the disk does not take it now, :meth:`sync` tries again."""
        with self._lock:
            self._late.append(parts)
            try:
                self._write()
            except OSError:
                return  # sync says so, and without it nothing is acknowledged

    def sync(self) -> None:
        """Make all that was added durable.

        Raises :class:`CheckpointNotWritten`, and :class:`CheckpointCorrupt` if the disk has lost what it took.
        """
        try:
            with self._lock:
                self._write()
                if self._is_doubtful:
                    self._write_again()
                end, self._is_doubtful = self._end, True
            os.fsync(self._out.fileno())
        except OSError as error:
            raise CheckpointNotWritten(f"{self.file}: {error.strerror}; make room") from None
        self._durable, self._is_doubtful = end, False

    @property
    def size(self) -> int:
        """Bytes of the file so far."""
        return self._end

    def close(self) -> None:
        """Let go of the file."""
        self._out.close()

    def _write(self) -> None:
        while self._late:
            parts, checksum = self._late[0], xxhash.xxh3_64()
            for part in parts:
                checksum.update(part)
            length = sum(memoryview(part).nbytes for part in parts)
            self._put(self._end, HEAD.pack(length, checksum.intdigest()), *parts)
            self._end += HEAD.size + length
            del self._late[0]

    def _put(self, start: int, *parts: Buffer) -> None:
        self._out.seek(start)
        for part in parts:
            write_all(self._out, part)

    def _write_again(self) -> None:
        """After a failed fsync the system may call clean what the disk does not have: all since the last good one."""
        start = self._durable
        while start < self._end:
            self._out.seek(start)
            record = self._out.read(HEAD.size)
            length, checksum = HEAD.unpack(record) if len(record) == HEAD.size else (0, 0)
            body = _read_all(self._out, length) if start + HEAD.size + length <= self._end else b""
            if xxhash.xxh3_64_intdigest(body) != checksum:
                raise CheckpointCorrupt(
                    f"{self.file}: the disk has lost what was written from byte {start} on; nothing of it was "
                    "acknowledged. Look after the disk, and start again"
                )
            self._put(start, record, body)
            start += HEAD.size + length


class KeptUpdates:
    """Finds kept updates by id. Holds where each one is, some 200 bytes an update, and not what is in it."""

    def __init__(self, folder: Path) -> None:
        """Nothing is read before :meth:`refresh`."""
        self.folder = folder
        self._damaged: list[str] = []
        self._unread: dict[Path, str] = {}
        self._places: dict[tuple[str, str], dict[int, tuple[int, ...]]] = {}
        self._ends: dict[Path, int] = {}
        self._open: tuple[Path, BinaryIO] | None = None

    @property
    def damage(self) -> list[str]:
        """Where a record has no readable head, and where a file cannot be read any further."""
        return [*self._damaged, *self._unread.values()]

    def refresh(self) -> None:
        """Look at the heads of all messages that are new since the last time. Raises :class:`CheckpointError`."""
        for file in sorted(self.folder.glob("[0-9]*.log")):
            try:
                with file.open("rb") as content:
                    self._scan(file, content)
            except OSError as error:
                raise CheckpointError(f"{file} cannot be read: {error.strerror or error}") from None

    def __len__(self) -> int:
        """Updates that were found; one that stands there twice counts once."""
        return sum(len(by_seq) for by_seq in self._places.values())

    def check(self) -> Iterator[str]:
        """Read all records that were found; where one does not match its checksum.

        Raises :class:`CheckpointError` if a file cannot be read.
        """
        for file, end in sorted(self._ends.items()):
            try:
                with file.open("rb") as content:
                    for start, is_sound in _records(content, end):
                        if not is_sound:
                            yield f"{file}: the record at byte {start} does not match its checksum"
            except (OSError, struct.error) as error:
                raise CheckpointError(f"{file} cannot be read: {error}") from None

    def has(self, update_id: UpdateId, epoch: int) -> bool:
        """Whether there is an update with this id that was folded under ``epoch`` or an earlier one."""
        return self._place(update_id, epoch) is not None

    def read(self, update_id: UpdateId, epoch: int) -> bytes:
        """The message of the update that was folded under ``epoch``, or under the newest before it.

        Raises :class:`LineageError` if it is not there or damaged.
        """
        place = self._place(update_id, epoch)
        if place is None:
            raise LineageError(f"update {update_id} is not in {self.folder}")
        file, start = self.folder / _name(place >> _OFFSET_BITS), place & ((1 << _OFFSET_BITS) - 1)
        try:
            content = self._file(file)
            content.seek(start)
            length, checksum = HEAD.unpack(content.read(HEAD.size))
            body = content.read(length)
        except (OSError, struct.error) as error:
            raise LineageError(f"{file}: update {update_id} at byte {start} cannot be read: {error}") from None
        if xxhash.xxh3_64_intdigest(body) != checksum:
            raise LineageError(
                f"{file}: update {update_id} at byte {start} does not match its checksum; restore the file from a "
                "backup, or rebuild from a later version on"
            )
        return body

    def close(self) -> None:
        """Let go of the file that was read last."""
        if self._open is not None:
            self._open[1].close()
            self._open = None

    def _place(self, update_id: UpdateId, epoch: int) -> int | None:
        known = self._places.get((update_id.worker, update_id.incarnation), {}).get(update_id.seq, ())
        # A crash before the checkpoint makes an update come, and be folded, again: the last time counts.
        return max((place for place in known if place >> _OFFSET_BITS <= epoch), default=None)

    def _file(self, file: Path) -> BinaryIO:
        if self._open is None or self._open[0] != file:
            self.close()
            self._open = file, file.open("rb")
        return self._open[1]

    def _scan(self, file: Path, content: BinaryIO) -> None:
        epoch, size, start = int(file.stem), file.stat().st_size, self._ends.get(file, 0)
        while start + HEAD.size <= size:
            content.seek(start)
            length, _ = HEAD.unpack(content.read(HEAD.size))
            end = start + HEAD.size + length
            if end > size:
                break
            update_id = _id_of(content.read(min(length, SEAL_BYTES + PREFIX.size + MAX_HEADER)))
            if update_id is None:
                self._damaged.append(f"{file}: the record at byte {start} is damaged")
            else:
                by_seq = self._places.setdefault((update_id.worker, update_id.incarnation), {})
                by_seq[update_id.seq] = (*by_seq.get(update_id.seq, ()), epoch << _OFFSET_BITS | start)
            start = self._ends[file] = end
        self._unread.pop(file, None)
        if start < size:
            self._unread[file] = f"{file} cannot be read from byte {start} on"


def _records(content: BinaryIO, end: int) -> Iterator[tuple[int, bool]]:
    """Where each record before ``end`` begins, and whether it matches its checksum; in pieces, as it may be large."""
    start = 0
    while start < end:
        length, checksum = HEAD.unpack(content.read(HEAD.size))
        found, rest = xxhash.xxh3_64(), length
        while rest and (piece := content.read(min(rest, PIECE))):
            found.update(piece)
            rest -= len(piece)
        yield start, not rest and found.intdigest() == checksum
        start += HEAD.size + length


def _read_all(file: BinaryIO, length: int) -> bytes:
    """``length`` bytes, or as many as there are."""
    parts = []
    while length and (part := file.read(length)):
        parts.append(part)
        length -= len(part)
    return b"".join(parts)


def base_file(folder: Path, version: int) -> Path:
    """Where the state of ``version`` is, if updates are kept in ``folder`` from there on."""
    return folder / f"base-{version:010d}.safetensors"


def _name(epoch: int) -> str:
    return f"{epoch:08d}.log"


def _id_of(message: bytes) -> UpdateId | None:
    """Whose update ``message``, or its beginning, is; None if that cannot be read."""
    try:
        header, _ = unpack(message)
        return _ID.validate_python(header.get("id"))
    except (WireError, ValidationError):
        return None
