"""Rows on disk: as they were written, or an error that says so, whatever the disk does."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregator import rowfile
from aggregator.rowfile import HEAD, RowFile, RowPart, StoredRows, copy_rows, open_rows
from aggregator.spool import DiskSpool, SpooledRows
from aggregator.strategies.rows import MemorySpool
from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten
from broker.messages import Array, ModelSpec
from tests.support.builders import spec_of, vector

MODEL = spec_of({"w": vector(0, 0, 0), "b": vector(0)})
ROWS = [vector(1, 2, 3, 4), vector(5, 6, 7, 8), vector(9, 10, 11, 12)]
#: Bytes of a row.
STRIDE = 16


@pytest.fixture
def rows(tmp_path: Path) -> SpooledRows:
    """All three, not durable yet."""
    rows = DiskSpool(tmp_path, 7).begin(MODEL)
    for index, row in enumerate(ROWS):
        rows.append([row], 1.0, f"w{index}")
    return rows


@pytest.fixture
def file(rows: SpooledRows) -> RowFile:
    return rows.lend().parts[0][0]


def read(folder: Path, parts: tuple[RowPart, ...], model: ModelSpec = MODEL) -> StoredRows:
    count = sum(len(part.sums) for part in parts)
    return open_rows(folder, model, parts, [1.0] * count, ["w"] * count)


def flip(path: Path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def fail(number: int) -> Callable[..., Any]:
    def call(*_: object) -> Any:
        raise OSError(number, os.strerror(number))

    return call


# -------------------------------------------------------------------------------------------- as they were written


def test_rows_come_back_from_what_a_checkpoint_says_of_them(rows: SpooledRows, tmp_path: Path) -> None:
    found = read(tmp_path, rows.lend().refer())

    assert (found.count, found.size, found.dtype) == (3, 4, np.dtype(np.float32))
    np.testing.assert_array_equal(found.block(0, 4), ROWS)
    np.testing.assert_array_equal(found.block(1, 3), np.array(ROWS)[:, 1:3])
    np.testing.assert_array_equal(found.row(1), ROWS[1])
    assert [path.name for path in tmp_path.iterdir()] == ["00000007-000001.rows"]


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from([np.float16, np.float32, np.float64, ml_dtypes.bfloat16]),
    count=st.integers(1, 4),
    size=st.integers(0, 40),
    data=st.data(),
)
def test_rows_on_disk_are_those_in_memory_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, dtype: Any, count: int, size: int, data: st.DataObject
) -> None:
    """However an update is cut into pieces, and whatever is read of it."""
    model = spec_of({"w": np.zeros(size, dtype)})
    both = MemorySpool().begin(model), DiskSpool(tmp_path_factory.mktemp("rows"), 1).begin(model)
    for index in range(count):
        values = np.random.default_rng(index).standard_normal(size).astype(dtype)
        cuts = sorted(data.draw(st.lists(st.integers(0, size), max_size=3)))
        for kept in both:
            kept.append(np.split(values, cuts), 1 / (index + 1), f"w{index}")
    start, stop = sorted((data.draw(st.integers(0, size)), data.draw(st.integers(0, size))))

    memory, disk = both
    assert (memory.count, memory.size, memory.dtype) == (disk.count, disk.size, disk.dtype)
    assert (memory.weights, memory.workers) == (disk.weights, disk.workers)
    assert memory.block(start, stop).tobytes() == disk.block(start, stop).tobytes()
    assert memory.block(start, stop).shape == disk.block(start, stop).shape
    assert [memory.row(i).tobytes() for i in range(count)] == [disk.row(i).tobytes() for i in range(count)]


def test_pieces_larger_than_what_is_widened_together_are_written_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rowfile, "_PIECE", 3)
    monkeypatch.setattr(rowfile, "_BYTES", 8)
    values = np.arange(11, dtype=np.float16)
    rows = DiskSpool(tmp_path, 1).begin(spec_of({"w": values}))

    rows.append([values], 1.0, "w0")

    found = read(tmp_path, rows.lend().refer(), spec_of({"w": values}))
    np.testing.assert_array_equal(found.row(0), values.astype(np.float32))


def test_who_takes_over_writes_into_a_file_of_its_own(rows: SpooledRows, tmp_path: Path) -> None:
    lent = rows.lend()
    successor = DiskSpool(tmp_path, 8).resume(read(tmp_path, lent.refer()))
    rows.append([vector(0, 0, 0, 0)], 1.0, "late")  # the one that was taken for dead

    successor.append([vector(13, 14, 15, 16)], 0.5, "w3")

    parts = successor.lend().refer()
    assert [(part.file, len(part.sums)) for part in parts] == [("00000007-000001.rows", 3), ("00000008-000001.rows", 1)]
    np.testing.assert_array_equal(read(tmp_path, parts).block(0, 4)[2:], [ROWS[2], vector(13, 14, 15, 16)])
    np.testing.assert_array_equal(successor.row(3), vector(6.5, 7, 7.5, 8))


def test_copied_rows_are_one_file_and_stand_for_themselves(rows: SpooledRows, tmp_path: Path) -> None:
    successor = DiskSpool(tmp_path, 8).resume(rows.lend())
    successor.append([vector(13, 14, 15, 16)], 1.0, "w3")
    target = tmp_path / "updates" / "base-0000000003.rows"

    parts = copy_rows(successor.lend(), target)

    for path in tmp_path.glob("*.rows"):
        path.unlink()
    assert [(part.file, len(part.sums)) for part in parts] == [(target.name, 4)]
    np.testing.assert_array_equal(read(target.parent, parts).block(0, 1)[:, 0], [1, 5, 9, 13])
    assert list(target.parent.iterdir()) == [target]


# ------------------------------------------------------------------------------------------------------- damage


def test_what_stands_behind_the_rows_that_count_does_not_matter(rows: SpooledRows, tmp_path: Path) -> None:
    (part,) = rows.lend().refer()
    path = tmp_path / part.file
    path.write_bytes(path.read_bytes()[: -STRIDE // 2])  # the third is torn

    found = read(tmp_path, (RowPart(part.file, part.sums[:2]),))

    np.testing.assert_array_equal(found.block(0, 4), ROWS[:2])
    with pytest.raises(CheckpointCorrupt, match="ends within row 2"):
        read(tmp_path, (part,))


@pytest.mark.parametrize("row", [0, 1, 2])
@pytest.mark.parametrize("byte", [0, STRIDE - 1])
def test_a_flipped_bit_is_found_out(rows: SpooledRows, tmp_path: Path, row: int, byte: int) -> None:
    parts = rows.lend().refer()
    flip(tmp_path / parts[0].file, HEAD.size + row * STRIDE + byte)

    with pytest.raises(CheckpointCorrupt, match=f"row {row} does not match its checksum"):
        read(tmp_path, parts)
    if row:
        read(tmp_path, (RowPart(parts[0].file, parts[0].sums[:row]),))


@pytest.mark.parametrize("place", range(0, HEAD.size, 7))
def test_a_damaged_beginning_is_found_out(rows: SpooledRows, tmp_path: Path, place: int) -> None:
    parts = rows.lend().refer()
    flip(tmp_path / parts[0].file, place)
    with pytest.raises(CheckpointCorrupt, match="its beginning is damaged"):
        read(tmp_path, parts)


def test_rows_of_another_model_are_refused(rows: SpooledRows, tmp_path: Path) -> None:
    parts = rows.lend().refer()
    for other in (spec_of({"w": vector(0, 0, 0), "c": vector(0)}), spec_of({"w": vector(0, 0, 0, 0)})):
        with pytest.raises(CheckpointCorrupt, match="rows of another model"):
            read(tmp_path, parts, other)


def test_a_checkpoint_that_names_other_files_or_other_counts_is_refused(rows: SpooledRows, tmp_path: Path) -> None:
    (part,) = rows.lend().refer()
    with pytest.raises(CheckpointCorrupt, match="no name of a file of rows"):
        read(tmp_path, (RowPart(f"../{tmp_path.name}/{part.file}", part.sums),))
    with pytest.raises(CheckpointCorrupt, match="more or fewer rows than it lists updates"):
        open_rows(tmp_path, MODEL, (part,), [1.0], ["w"])
    with pytest.raises(FileNotFoundError):
        read(tmp_path, (RowPart("00000001-000001.rows", part.sums),))


def test_a_disk_that_does_not_answer_is_no_damage(file: RowFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or an older generation would take the place of the newest."""
    monkeypatch.setattr(os, "preadv", fail(errno.EIO))
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error") as raised:
        file.read(0, 0, np.empty(4, np.float32))
    assert not isinstance(raised.value, CheckpointCorrupt)


# ------------------------------------------------------------------------------------------------------- no room


def test_a_row_that_the_disk_does_not_take_is_not_there_and_can_be_added_later(
    rows: SpooledRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows.lend()
    pwrite = os.pwrite
    room = [fail(errno.ENOSPC), pwrite]

    def first_piece_only(handle: int, content: Any, place: int) -> Any:
        return room.pop()(handle, content, place)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", first_piece_only)
        with pytest.raises(CheckpointNotWritten, match="No space left on device; make room"):
            rows.append([vector(0, 0), vector(0, 0)], 1.0, "w3")
    assert rows.lend() == before
    (file,) = tmp_path.iterdir()
    assert file.stat().st_size == HEAD.size + 3 * STRIDE, "what was written of it would take room from the checkpoints"

    rows.append([vector(13, 14, 15, 16)], 1.0, "w3")

    np.testing.assert_array_equal(read(tmp_path, rows.lend().refer()).row(3), vector(13, 14, 15, 16))


@pytest.mark.parametrize("values", [[], [1, 2, 3], [1, 2, 3, 4, 5]])
def test_a_row_of_another_length_is_refused(rows: SpooledRows, values: list[float]) -> None:
    before = rows.lend()
    with pytest.raises(ValueError, match="a row has 4 elements"):
        rows.append([vector(*values)], 1.0, "w3")
    assert rows.lend() == before


def test_a_file_that_cannot_be_made_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = DiskSpool(tmp_path, 1).begin(MODEL)
    pwrite = os.pwrite

    def head_only(handle: int, content: Any, place: int) -> int:
        return pwrite(handle, content, place) if place == 0 else fail(errno.ENOSPC)()

    for name, call in (("open", fail(errno.ENOSPC)), ("pwrite", fail(errno.ENOSPC)), ("pwrite", head_only)):
        with monkeypatch.context() as patch:
            patch.setattr(os, name, call)
            with pytest.raises(CheckpointNotWritten, match="No space left on device"):
                rows.append([ROWS[0]], 1.0, "w0")
        assert list(tmp_path.iterdir()) == []

    for row in ROWS[:2]:
        rows.append([row], 1.0, "w0")
    assert [len(part.sums) for part in rows.lend().refer()] == [2]


# ------------------------------------------------------------------------------------------------------ durability


def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is done to files from now on."""
    done: list[str] = []
    fsync, pwrite = os.fsync, os.pwrite

    def noted_sync(handle: int) -> None:
        done.append("fsync")
        fsync(handle)

    def noted_write(handle: int, content: Any, place: int) -> int:
        done.append(f"write at {place}")
        return pwrite(handle, content, place)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "pwrite", noted_write)
    return done


def test_rows_are_made_durable_once_and_the_files_name_with_the_first(
    rows: SpooledRows, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = synced(monkeypatch)
    rows.lend().sync()
    assert done == ["fsync", "fsync"]  # the file and the folder
    rows.lend().sync()
    assert done == ["fsync", "fsync"]
    rows.append([vector(13, 14, 15, 16)], 1.0, "w3")
    rows.lend().sync()
    assert done[2:] == [f"write at {HEAD.size + 3 * STRIDE}", "fsync"]


def test_an_fsync_that_fails_is_repeated_with_the_rows_written_again(
    rows: SpooledRows, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows.lend().sync()
    rows.append([vector(13, 14, 15, 16)], 1.0, "w3")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(errno.EIO))
        for _ in range(2):
            with pytest.raises(CheckpointNotWritten, match="Input/output error"):
                rows.lend().sync()
    rows.append([vector(17, 18, 19, 20)], 1.0, "w4")
    done = synced(monkeypatch)

    rows.lend().sync()

    # Not what was durable before.
    assert done == [f"write at {HEAD.size + 3 * STRIDE}", f"write at {HEAD.size + 4 * STRIDE}", "fsync"]
    np.testing.assert_array_equal(read(tmp_path, rows.lend().refer()).block(0, 1)[:, 0], [1, 5, 9, 13, 17])


def test_what_the_disk_has_lost_after_a_failed_fsync_is_not_called_durable(
    rows: SpooledRows, file: RowFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail(errno.EIO))
        with pytest.raises(CheckpointNotWritten):
            rows.lend().sync()
    with file.path.open("r+b") as other:
        other.seek(HEAD.size + STRIDE)
        other.write(bytes(4))

    with pytest.raises(CheckpointCorrupt, match="the disk has lost row 1, which was not acknowledged"):
        rows.lend().sync()


# ---------------------------------------------------------------------------------------------------- stale files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_files_that_nobody_needs_are_deleted(tmp_path: Path) -> None:
    spool = DiskSpool(tmp_path, 7)
    kept: Iterator[SpooledRows] = (spool.begin(MODEL) for _ in range(3))
    closed, lent, opened = kept
    for rows in (closed, lent, opened):
        rows.append([ROWS[0]], 1.0, "w0")
    value = lent.lend()
    for strange in (
        "00000006-000001.rows",
        "00000006-000002.rows",
        "00000008-000001.rows",
        "notes.rows",
        "1-2.rows.bak",
    ):
        (tmp_path / strange).touch()
    del rows, closed, lent

    spool.sweep(lambda: None)  # not known now
    assert len(names(tmp_path)) == 8
    spool.sweep(lambda: {"00000006-000001.rows"})

    assert names(tmp_path) == [
        "00000006-000001.rows",  # a checkpoint refers to it
        "00000007-000002.rows",  # a checkpoint is being written
        "00000007-000003.rows",  # of the open round
        "00000008-000001.rows",  # a successor's
        "1-2.rows.bak",
        "notes.rows",
    ]
    np.testing.assert_array_equal(value.row(0), ROWS[0])
    assert opened.count == 1


def test_a_file_of_the_same_name_from_another_life_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "00000007-000001.rows").write_bytes(b"old")
    rows = DiskSpool(tmp_path, 7).begin(MODEL)

    rows.append([ROWS[0]], 1.0, "w0")

    assert rows.lend().refer()[0].file == "00000007-000002.rows"
    assert (tmp_path / "00000007-000001.rows").read_bytes() == b"old"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_files_are_closed_when_nobody_reads_them(rows: SpooledRows, tmp_path: Path) -> None:
    def handles() -> int:
        links = [link for link in Path("/proc/self/fd").iterdir() if link.exists()]
        return sum(link.resolve().parent == tmp_path for link in links)

    assert handles() == 1
    found = [read(tmp_path, rows.lend().refer()) for _ in range(3)]
    assert handles() == 4
    del found
    assert handles() == 1


def test_a_rule_reads_only_what_it_asks_for(rows: SpooledRows, monkeypatch: pytest.MonkeyPatch) -> None:
    read_bytes: list[int] = []
    preadv = os.preadv

    def counted(handle: int, buffers: Any, place: int) -> int:
        read_bytes.append(sum(len(buffer) for buffer in buffers))
        return preadv(handle, buffers, place)

    monkeypatch.setattr(os, "preadv", counted)
    block: Array = rows.block(2, 4)
    assert read_bytes == [8, 8, 8]
    np.testing.assert_array_equal(block, np.array(ROWS)[:, 2:])
