"""Where the rows of rounds are kept in production: in files beside the checkpoints.

Files are named ``<epoch>-<number>.rows``. One is needed as long as the round that it belongs to is open, and as long
as a checkpoint that is kept refers to it; :meth:`DiskSpool.sweep` deletes the others.
"""

from __future__ import annotations

import contextlib
import re
import threading
import weakref
from collections.abc import Callable, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.rowfile import RowFile, StoredRows
from aggregator.strategies.rows import Rows, row_shape
from broker.messages import Array, ModelSpec

__all__ = ["DiskSpool"]

_NAME = re.compile(r"(\d{8,})-\d+\.rows")


class DiskSpool:
    """The rows of one run under one epoch."""

    def __init__(self, folder: Path, epoch: int) -> None:
        """Nothing is touched yet.

        Args:
            folder: the run's checkpoints.
            epoch: of the aggregator; it deletes no file of a later one.
        """
        self._folder = folder
        self._epoch = epoch
        self._number = 0
        self._live: weakref.WeakSet[RowFile] = weakref.WeakSet()
        self._lock = threading.Lock()
        """Of what lives: a file is in there as soon as it is on the disk."""

    def begin(self, model: ModelSpec) -> SpooledRows:
        """See :class:`aggregator.strategies.rows.Spool`."""
        return SpooledRows(self, StoredRows(model, *row_shape(model)))

    def resume(self, rows: Rows) -> SpooledRows:
        """See :class:`aggregator.strategies.rows.Spool`; ``rows`` are of a checkpoint in the folder."""
        if not isinstance(rows, StoredRows):
            raise TypeError(f"rows on disk cannot go on from {type(rows).__name__}")
        with self._lock:
            self._live.update(file for file, _ in rows.parts)
        return SpooledRows(self, rows)

    def create(self, model: ModelSpec) -> RowFile:
        """A new file. Raises :class:`CheckpointNotWritten`."""
        while True:
            self._number += 1
            try:
                with self._lock:
                    file = RowFile.create(self._folder / f"{self._epoch:08d}-{self._number:06d}.rows", model)
                    self._live.add(file)
            except FileExistsError:
                continue  # of another life under the same epoch, as after a backup was restored
            return file

    def sweep(self, needed: Callable[[], AbstractSet[str] | None]) -> None:
        """Delete the files that neither a round of this process nor a checkpoint has any use for.

        May be called on another thread than the rest. A file that cannot be deleted now is deleted later.

        Args:
            needed: gives the names of those that checkpoints refer to; None if that is not known now.
        """
        # In this order: a file that is made meanwhile was not found, and one that is let go of meanwhile still lived.
        # One that did not is referred to by whatever was written while it did.
        found = [file for file in self._folder.glob("[0-9]*.rows") if self._is_past(file)]
        with self._lock:
            live = {file.path.name for file in self._live}
        stale = [file for file in found if file.name not in live]
        if not stale or (names := needed()) is None:
            return
        for file in stale:
            if file.name not in names:
                with contextlib.suppress(OSError):
                    file.unlink()

    def _is_past(self, file: Path) -> bool:
        match = _NAME.fullmatch(file.name)
        return match is not None and int(match[1]) <= self._epoch


class SpooledRows:
    """The rows of an open round. See :class:`aggregator.strategies.rows.GrowingRows`."""

    def __init__(self, spool: DiskSpool, rows: StoredRows) -> None:
        """``rows`` are there already."""
        self._spool = spool
        self._rows = rows
        self._file: RowFile | None = None

    @property
    def count(self) -> int:
        """Rows."""
        return self._rows.count

    @property
    def size(self) -> int:
        """Elements of a row."""
        return self._rows.size

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of what is read."""
        return self._rows.dtype

    @property
    def weights(self) -> tuple[float, ...]:
        """Of each row."""
        return self._rows.weights

    @property
    def workers(self) -> tuple[str, ...]:
        """Of each row."""
        return self._rows.workers

    def append(self, values: Iterable[Array], weight: float, worker: str) -> None:
        """Write a row to the file, which is made for the first one. It is not durable yet."""
        rows = self._rows
        file = self._file or self._spool.create(rows.model)
        try:
            checksum = file.append(values)
        except BaseException:
            if self._file is None:  # or each attempt on a full disk would leave one behind
                file.path.unlink(missing_ok=True)
            raise
        ours = rows.parts[-1][1] if self._file is not None else ()
        others = rows.parts[:-1] if self._file is not None else rows.parts
        self._file = file
        self._rows = replace(
            rows,
            weights=(*rows.weights, weight),
            workers=(*rows.workers, worker),
            parts=(*others, (file, (*ours, checksum))),
        )

    def lend(self) -> StoredRows:
        """The rows of now."""
        return self._rows

    def block(self, start: int, stop: int) -> Array:
        """Of all rows."""
        return self._rows.block(start, stop)

    def row(self, index: int) -> Array:
        """One row."""
        return self._rows.row(index)
