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
from pathlib import Path
from typing import BinaryIO

import xxhash
from pydantic import TypeAdapter, ValidationError

from broker.errors import CheckpointError, CheckpointNotWritten, LineageError, WireError
from broker.messages import UpdateId
from broker.wire.envelope import MAX_HEADER, PREFIX, unpack

__all__ = ["KeptUpdates", "UpdateArchive", "base_file"]

HEAD = struct.Struct("<QQ")

#: Where a record begins takes one number: the file's epoch, and so many bits for the position in it.
_OFFSET_BITS = 48

_ID: TypeAdapter[UpdateId] = TypeAdapter(UpdateId)


class UpdateArchive:
    """The file of one epoch. ``add`` and ``sync`` may be called from different threads."""

    def __init__(self, folder: Path, epoch: int) -> None:
        """Raises :class:`CheckpointNotWritten` if the file cannot be made."""
        self.file = folder / _name(epoch)
        self._lock = threading.Lock()
        self._late: list[bytes] = []
        self._end = 0
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._out: BinaryIO = self.file.open("xb", buffering=0)
            handle = os.open(folder, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        except OSError as error:
            raise CheckpointNotWritten(f"{self.file}: {error.strerror}; make the folder writable") from None

    def add(self, body: bytes) -> None:
        """Keep ``body``. If the disk does not take it now, :meth:`sync` tries again."""
        with self._lock:
            self._late.append(body)
            try:
                self._write()
            except OSError:
                return  # sync says so, and without it nothing is acknowledged

    def sync(self) -> None:
        """Make all that was added durable. Raises :class:`CheckpointNotWritten`."""
        try:
            with self._lock:
                self._write()
            os.fsync(self._out.fileno())
        except OSError as error:
            raise CheckpointNotWritten(f"{self.file}: {error.strerror}; make room") from None

    def close(self) -> None:
        """Let go of the file."""
        self._out.close()

    def _write(self) -> None:
        while self._late:
            body = self._late[0]
            record = HEAD.pack(len(body), xxhash.xxh3_64_intdigest(body))
            self._out.seek(self._end)
            for part in (record, body):
                rest = memoryview(part)
                while rest:
                    rest = rest[self._out.write(rest) :]
            self._end += len(record) + len(body)
            del self._late[0]


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
            update_id = _id_of(content.read(min(length, PREFIX.size + MAX_HEADER)))
            if update_id is None:
                self._damaged.append(f"{file}: the record at byte {start} is damaged")
            else:
                by_seq = self._places.setdefault((update_id.worker, update_id.incarnation), {})
                by_seq[update_id.seq] = (*by_seq.get(update_id.seq, ()), epoch << _OFFSET_BITS | start)
            start = self._ends[file] = end
        self._unread.pop(file, None)
        if start < size:
            self._unread[file] = f"{file} cannot be read from byte {start} on"


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
