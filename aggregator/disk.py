"""Folders whose entries survive a crash of the machine: a file's own fsync says nothing about its name."""

from __future__ import annotations

import os
from io import RawIOBase
from pathlib import Path

__all__ = ["make_folder", "sync_folder", "write_all"]


def make_folder(folder: Path) -> None:
    """Make ``folder`` and those above it that are missing, durably. Raises :class:`OSError`."""
    if folder.is_dir():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make durable which files ``folder`` has, and under which names. Raises :class:`OSError`."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_all(file: RawIOBase, content: bytes | memoryview) -> None:
    """Write ``content`` to an unbuffered file, which may take it in pieces. Raises :class:`OSError`."""
    rest = memoryview(content)
    while rest:
        rest = rest[file.write(rest) or 0 :]
