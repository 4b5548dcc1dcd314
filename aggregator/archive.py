"""Every applied update on disk, if ``keep_updates`` is set: what ``fedmq replay`` rebuilds versions from.

One file for each epoch, ``<epoch>.log``, of records ``length | checksum | message``: two little-endian
64-bit numbers, the second the XXH3-64 of the message, and the message as the worker sent it. A record is durable
before the checkpoint that covers its update is written. After a crash an update may stand there twice, under the
same id and with the same bytes; a torn record at a file's end is of an update that was never acknowledged.
"""

from __future__ import annotations

import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import xxhash

from broker.errors import CheckpointNotWritten

__all__ = ["UpdateArchive", "read_archive"]

HEAD = struct.Struct("<QQ")


class UpdateArchive:
    """The file of one epoch. ``add`` and ``sync`` may be called from different threads."""

    def __init__(self, folder: Path, epoch: int) -> None:
        """Raises :class:`CheckpointNotWritten` if the file cannot be made."""
        self.file = folder / f"{epoch:08d}.log"
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


def read_archive(folder: Path) -> Iterator[bytes]:
    """All kept messages, oldest first; a torn or damaged record ends its file."""
    for file in sorted(folder.glob("[0-9]*.log")):
        with file.open("rb") as content:
            size = file.stat().st_size
            while len(head := content.read(HEAD.size)) == HEAD.size:
                length, checksum = HEAD.unpack(head)
                if length > size - content.tell():
                    break
                body = content.read(length)
                if xxhash.xxh3_64_intdigest(body) != checksum:
                    break
                yield body
