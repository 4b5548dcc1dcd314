"""Files and folders whose entries survive a crash of the machine: a file's own fsync says nothing about its name."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from io import RawIOBase
from pathlib import Path
from typing import BinaryIO

__all__ = ["make_folder", "replace_file", "sync_folder", "write_all"]


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


def replace_file(target: Path, write: Callable[[BinaryIO], object]) -> None:
    """Have ``write`` write ``target``, which is there whole, or as it was before. Raises :class:`OSError`."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
