"""Kept updates on a disk that fails: what is called durable is on it, each record once, whole."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import xxhash

from aggregator.archive import HEAD, UpdateArchive
from broker.errors import CheckpointCorrupt, CheckpointNotWritten
from tests.support.smalldisk import SmallDisk, small_disk

BODIES = [bytes([n]) * 3000 for n in range(1, 5)]


def records(content: bytes) -> list[bytes]:
    found, start = [], 0
    while start < len(content):
        length, checksum = HEAD.unpack_from(content, start)
        found.append(content[start + HEAD.size : start + HEAD.size + length])
        assert xxhash.xxh3_64_intdigest(found[-1]) == checksum
        start += HEAD.size + length
    return found


def fail(_handle: int) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


@pytest.fixture
def archive(tmp_path: Path) -> Iterator[UpdateArchive]:
    archive = UpdateArchive(tmp_path / "updates", 1)
    yield archive
    archive.close()


def written(archive: UpdateArchive, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Where the file is written from now on."""
    places: list[int] = []
    put = archive._put

    def watched(start: int, *parts: bytes) -> None:
        places.append(start)
        put(start, *parts)

    monkeypatch.setattr(archive, "_put", watched)
    return places


def test_an_fsync_that_fails_is_repeated_with_the_bytes_written_again(
    archive: UpdateArchive, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive.add(BODIES[0])
    archive.sync()
    archive.add(BODIES[1])
    archive.add(BODIES[2])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        for _ in range(2):
            with pytest.raises(CheckpointNotWritten, match="Input/output error; make room"):
                archive.sync()
    archive.add(BODIES[3])
    places = written(archive, monkeypatch)

    archive.sync()
    archive.sync()

    size = HEAD.size + len(BODIES[0])
    assert places == [size, 2 * size, 3 * size]  # not what was durable before, and once
    assert records(archive.file.read_bytes()) == BODIES


@pytest.mark.parametrize("lost", [slice(3016, 3020), slice(3032, 3040), slice(-1, None)])
def test_what_the_disk_has_lost_after_a_failed_fsync_is_not_called_durable(
    archive: UpdateArchive, monkeypatch: pytest.MonkeyPatch, lost: slice
) -> None:
    archive.add(BODIES[0])
    archive.sync()
    archive.add(BODIES[1])
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointNotWritten):
            archive.sync()
    content = bytearray(archive.file.read_bytes())
    content[lost] = b"\xee" * len(content[lost])
    archive.file.write_bytes(content)

    for _ in range(2):
        with pytest.raises(CheckpointCorrupt, match=r"from byte 3016 on.*start again"):
            archive.sync()


def test_an_epoch_that_was_used_before_is_a_clear_error(archive: UpdateArchive) -> None:
    with pytest.raises(CheckpointNotWritten, match=r"00000001.log is there already.*start again"):
        UpdateArchive(archive.file.parent, 1)


def test_a_disk_that_is_really_full_loses_nothing_and_room_cures_it(tmp_path: Path) -> None:
    disk: SmallDisk
    with small_disk(tmp_path / "small", kilobytes=128) as disk:
        archive = UpdateArchive(disk.folder / "updates", 1)
        archive.add(BODIES[0])
        archive.sync()
        disk.fill()
        for body in BODIES[1:]:
            archive.add(body)
        with pytest.raises(CheckpointNotWritten, match="No space left on device; make room"):
            archive.sync()

        disk.make_room()

        archive.sync()
        assert records(archive.file.read_bytes()) == BODIES
        archive.close()
