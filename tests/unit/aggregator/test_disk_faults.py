"""Disks that are full, that fail, that lie once; files that were cut, flipped, emptied; writers that meet."""

from __future__ import annotations

import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from aggregator import checkpoint as module
from aggregator import checkpointfile
from aggregator.checkpoint import CheckpointStore
from aggregator.checkpointfile import ForeignCheckpoint, contents, read_checkpoint, write_tensors
from aggregator.core.rounds import Buffered
from aggregator.core.rules import CommitPolicy
from aggregator.core.snapshot import Snapshot
from aggregator.history import History, read_history
from aggregator.optimizers import Sgd
from broker.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointNotWritten,
    CheckpointOutdated,
    StaleEpoch,
)
from tests.support.builders import RUN, rules_of, spec_of, update_of
from tests.support.smalldisk import SmallDisk, small_disk
from tests.unit.aggregator.driver import Driver

TENSORS = {
    "w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "half": np.ones(3, ml_dtypes.bfloat16),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", RUN)
    store.create(spec_of(TENSORS), TENSORS, now=1.0)
    return store


def mid_round(store: CheckpointStore) -> Snapshot:
    """With momentum, a partial round and a version's record in it."""
    rules = rules_of(
        rounds=Buffered(size=2, max_staleness=9), optimizer=Sgd(0.5, momentum=0.9), commit=CommitPolicy(count=1)
    )
    driver = Driver(rules, store.claim())
    for seq in range(3):
        driver.update(update_of({n: np.ones_like(a) for n, a in TENSORS.items()}, seq=seq))
    return driver.machine.snapshot(5.0)


def bits(snapshot: Snapshot) -> tuple[dict[str, bytes], dict[str, str]]:
    """All that is in a snapshot."""
    arrays, metadata = contents(snapshot)
    return {name: array.tobytes() for name, array in arrays.items()}, metadata


def _read(file: Path) -> Snapshot | CheckpointCorrupt:
    try:
        return read_checkpoint(file)
    except CheckpointCorrupt as error:
        return error


# -------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("mask", [0x01, 0x0F, 0x80])
def test_every_flipped_byte_is_noticed_or_changes_nothing(store: CheckpointStore, mask: int) -> None:
    """Nothing that differs is taken, or blamed on a newer release.

    What may pass is white space as other white space, and the names of the sums over layout and head: then the file
    looks like an older one, and has the same contents.
    """
    file = store.write(mid_round(store))
    whole = file.read_bytes()
    expected = bits(read_checkpoint(file))
    harmless = {n for n, byte in enumerate(whole) if byte == ord(" ")}
    for name in (b'"layout":', b'"head":'):
        harmless |= set(range(whole.index(name) + 1, whole.index(name) + len(name) - 2))
    for where in range(len(whole)):
        content = bytearray(whole)
        content[where] ^= mask
        file.write_bytes(content)
        found = _read(file)
        assert isinstance(found, CheckpointCorrupt) or (where in harmless and bits(found) == expected), where
        assert not isinstance(found, ForeignCheckpoint), where


def test_every_shorter_longer_and_empty_file_is_noticed(store: CheckpointStore) -> None:
    file = store.write(mid_round(store))
    whole = file.read_bytes()

    torn = [whole[:length] for length in range(len(whole))]
    for content in [*torn, whole + b"\0", whole + whole, bytes(len(whole)), whole[:-512] + bytes(512)]:
        file.write_bytes(content)
        with pytest.raises(CheckpointCorrupt) as caught:
            read_checkpoint(file)
        assert type(caught.value) is CheckpointCorrupt


@pytest.mark.parametrize(("ours", "other"), [(b'"F32"', b'"I32"'), (b"[0,3]", b"[0,7]"), (b"[2,3]", b"[3,2]")])
def test_the_same_bytes_as_other_numbers_are_noticed(store: CheckpointStore, ours: bytes, other: bytes) -> None:
    """The checkpoints of 0.1, which have no sum over the layout, are compared with their model."""
    file = store.files()[0]
    for drop in (False, True):
        arrays, metadata = contents(store.load())
        if drop:
            del metadata["layout"]
        with file.open("wb") as out:
            write_tensors(out, arrays, metadata)
        store.load()
        whole = file.read_bytes()
        assert ours in whole
        file.write_bytes(whole.replace(ours, other, 1))

        with pytest.raises(CheckpointCorrupt):
            store.load()
        file.write_bytes(whole)


def test_files_that_vanish_while_they_are_read_are_looked_for_again(store: CheckpointStore, monkeypatch: Any) -> None:
    """As when an aggregator writes its next generations meanwhile."""
    snapshot = store.claim()
    vanishing = store.files()[0]
    read = checkpointfile.read_checkpoint

    def vanish(file: Path) -> Snapshot:
        if vanishing.exists():
            store.write(snapshot)
            store.write(snapshot)
            assert not file.exists()
        return read(file)

    monkeypatch.setattr(module, "read_checkpoint", vanish)

    assert CheckpointStore(store.folder, RUN).load().version == 0


def test_a_disk_that_cannot_read_is_no_reason_to_fall_back(store: CheckpointStore) -> None:
    snapshot = store.claim()
    newest = store.write(snapshot)
    newest.unlink()
    newest.mkdir()

    with pytest.raises(CheckpointError, match="cannot be read") as caught:
        store.load()

    assert not isinstance(caught.value, CheckpointCorrupt)


# ----------------------------------------------------------------------------------------- the order of writing


class Recorder:
    """What is done to the disk, by inode, since names change; and a fault at a chosen step."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.steps: list[tuple[str, int]] = []
        self.fail: Callable[[str, int], OSError | None] = lambda _step, _inode: None
        fsync, replace, tensors = os.fsync, Path.replace, write_tensors

        def recording_fsync(handle: int) -> None:
            self.step("fsync", os.fstat(handle).st_ino)
            fsync(handle)

        def recording_replace(path: Path, target: Path) -> Path:
            self.step("rename", path.stat().st_ino)
            return replace(path, target)

        def recording_write(file: Any, *arguments: Any) -> None:
            self.step("write", os.fstat(file.fileno()).st_ino)
            tensors(file, *arguments)

        monkeypatch.setattr(os, "fsync", recording_fsync)
        monkeypatch.setattr(Path, "replace", recording_replace)
        monkeypatch.setattr(module, "write_tensors", recording_write)

    def step(self, name: str, inode: int) -> None:
        self.steps.append((name, inode))
        if (error := self.fail(name, inode)) is not None:
            raise error


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    return Recorder(monkeypatch)


def test_a_checkpoint_is_written_synced_renamed_and_its_folder_synced_in_this_order(
    store: CheckpointStore, recorder: Recorder
) -> None:
    file = store.write(store.load())

    inode, folder = file.stat().st_ino, store.folder.stat().st_ino
    assert recorder.steps == [("write", inode), ("fsync", inode), ("rename", inode), ("fsync", folder)]


def test_the_epoch_is_durable_before_a_claim_returns(store: CheckpointStore, recorder: Recorder) -> None:
    store.claim()

    inode, folder = (store.folder / "epoch").stat().st_ino, store.folder.stat().st_ino
    assert recorder.steps == [("fsync", inode), ("rename", inode), ("fsync", folder)]


def test_folders_are_durable_before_what_is_in_them(tmp_path: Path, recorder: Recorder) -> None:
    store = CheckpointStore(tmp_path / "runs" / "r" / "checkpoints", RUN)

    store.create(spec_of(TENSORS), TENSORS, now=1.0)

    above = [tmp_path, tmp_path / "runs", tmp_path / "runs" / "r"]
    assert recorder.steps[:3] == [("fsync", folder.stat().st_ino) for folder in above]


STEPS = ["write", "fsync", "rename", "fsync folder"]
FAULTS = [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("step", STEPS)
def test_a_fault_at_any_step_is_one_error_and_the_next_attempt_begins_anew(
    store: CheckpointStore, recorder: Recorder, step: str, fault: int
) -> None:
    """The temporary file is thrown away: after a failed fsync nobody knows what of it is on the disk."""
    snapshot = mid_round(store)
    folder = store.folder.stat().st_ino
    before = {file: file.read_bytes() for file in store.files()}
    recorder.steps.clear()

    def fail(name: str, inode: int) -> OSError | None:
        is_it = name == step.split(maxsplit=1)[0] and (inode == folder) == ("folder" in step)
        return OSError(fault, os.strerror(fault)) if is_it else None

    recorder.fail = fail
    with pytest.raises(CheckpointNotWritten, match=f"{os.strerror(fault)}; make room or make the folder writable"):
        store.write(snapshot)
    first = recorder.steps.copy()
    recorder.fail = lambda _name, _inode: None
    assert {file: content for file, content in before.items() if file.read_bytes() == content} == before
    assert not list(store.folder.glob(".*"))
    assert store.load().version in (0, snapshot.version)

    recorder.steps.clear()
    file = store.write(snapshot)

    inode = file.stat().st_ino
    assert recorder.steps == [("write", inode), ("fsync", inode), ("rename", inode), ("fsync", folder)]
    assert first[0][0] == "write"
    assert bits(store.load()) == bits(snapshot)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_temporary_file_that_cannot_be_made_is_the_same_error(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, fault: int
) -> None:
    snapshot = store.claim()
    opened = Path.open

    def refuse(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if "x" in mode:
            raise OSError(fault, os.strerror(fault))
        return opened(path, mode, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(CheckpointNotWritten, match=os.strerror(fault)):
            store.write(snapshot)
        with pytest.raises(CheckpointNotWritten, match=os.strerror(fault)):
            CheckpointStore(store.folder, RUN).claim()

    assert store.stored_epoch() == 1
    store.write(snapshot)


def test_an_fsync_of_the_history_that_fails_is_repeated_with_the_bytes_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    history = History(tmp_path / "history.jsonl")
    history.open((), epoch=1, version=0, now=1.0)
    content = history.file.read_bytes()

    def fail(_handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(CheckpointNotWritten, match="Input/output error"):
            history.sync()
    # What the system calls clean and the disk never got, as after a crash.
    history.file.write_bytes(bytes(len(content)))
    history.open((), epoch=2, version=0, now=2.0)

    history.sync()

    assert history.file.read_bytes().startswith(content)
    assert [line["epoch"] for line in read_history(history.file)] == [1, 2]


def test_a_folder_of_a_killed_writer_is_tidied_up_by_the_next_one(store: CheckpointStore) -> None:
    left = [".0000000002.safetensors.0a1b2c", ".epoch.0a1b2c"]
    for name in [*left, ".nfs0001", "notes.txt"]:
        (store.folder / name).write_bytes(b"torn")

    store.claim()

    names = {file.name for file in store.folder.iterdir()}
    assert not set(left) & names
    assert {".nfs0001", "notes.txt"} <= names


# ------------------------------------------------------------------------------------------------- real disks


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    with small_disk(tmp_path / "small", kilobytes=256) as disk:
        yield disk


def test_on_a_disk_that_is_really_full_nothing_is_lost_and_room_cures_it(disk: SmallDisk) -> None:
    tensors = {"w": np.ones(4096, np.float32)}
    store = CheckpointStore(disk.folder / "checkpoints", RUN)
    store.create(spec_of(tensors), tensors, now=1.0)
    snapshot = store.claim()
    history = History(disk.folder / "history.jsonl")
    history.open((), epoch=1, version=0, now=1.0)
    told = history.file.read_bytes()
    disk.fill()

    with pytest.raises(CheckpointNotWritten, match="No space left on device; make room"):
        store.write(snapshot)
    with pytest.raises(CheckpointNotWritten, match="No space left on device"):
        store.claim()
    for number in range(2000):
        history.command(f"command {number}", version=0, is_pending=False, now=2.0)
    with pytest.raises(CheckpointNotWritten, match="No space left on device; make room"):
        history.sync()
    # Up to the end of the block that the file had; never half a line.
    assert history.file.read_bytes().startswith(told)
    assert history.file.read_bytes().endswith(b"\n")

    disk.make_room()

    store.write(snapshot)
    history.sync()
    lines = [line["what"] for line in read_history(history.file) if line["kind"] == "command"]
    assert lines == [f"command {number}" for number in range(2000)]


def test_a_folder_that_is_really_read_only_can_be_read_and_says_so(disk: SmallDisk) -> None:
    store = CheckpointStore(disk.folder / "checkpoints", RUN)
    store.create(spec_of(TENSORS), TENSORS, now=1.0)
    snapshot = store.claim()
    disk.read_only()

    for attempt in (lambda: store.write(snapshot), store.claim):
        with pytest.raises(CheckpointNotWritten, match=r"Read-only file system.*make the folder writable"):
            attempt()
    with pytest.raises(CheckpointNotWritten, match="Read-only file system"):
        History(disk.folder / "history.jsonl").sync()
    assert store.load().version == 0


@pytest.mark.skipif(os.geteuid() == 0, reason="rights do not stop root; the test with a read-only disk does")
def test_a_folder_without_the_right_to_write_says_so(store: CheckpointStore) -> None:
    snapshot = store.claim()
    store.folder.chmod(0o500)
    try:
        with pytest.raises(CheckpointNotWritten, match=r"Permission denied; make .*writable"):
            store.write(snapshot)
        assert store.load().version == 0
    finally:
        store.folder.chmod(0o700)


# ------------------------------------------------------------------------------------------ epochs and locks


def test_a_claim_cannot_slip_in_between_the_comparison_of_epochs_and_the_rename(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = store.claim()
    rival = CheckpointStore(store.folder, RUN)
    has_waited = threading.Event()
    claimed: list[Snapshot] = []
    claimer = threading.Thread(target=lambda: claimed.append(rival.claim()))
    lock, replace = module._lock, Path.replace

    def watched(handle: int, file: Path) -> bool:
        is_ours = lock(handle, file)
        if not is_ours:
            has_waited.set()
        return is_ours

    def slow(path: Path, target: Path) -> Path:
        if not claimer.is_alive() and not claimed:
            claimer.start()
            assert has_waited.wait(30)
            assert not claimed
        return replace(path, target)

    monkeypatch.setattr(module, "_lock", watched)
    monkeypatch.setattr(Path, "replace", slow)

    written = store.write(old)
    claimer.join(30)

    (new,) = claimed
    assert new.epoch == old.epoch + 1
    assert store.files()[0] == written
    with pytest.raises(StaleEpoch):
        store.write(old)


def test_processes_that_claim_at_once_get_epochs_of_their_own(store: CheckpointStore) -> None:
    script = (
        "import sys; from pathlib import Path; from aggregator.checkpoint import CheckpointStore\n"
        "store = CheckpointStore(Path(sys.argv[1]), 'test'); sys.stdin.readline()\n"
        "for _ in range(10): print(store.claim().epoch)\n"
    )
    command = [sys.executable, "-c", script, str(store.folder)]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    epochs = [int(line) for process in processes for line in process.communicate(timeout=120)[0].splitlines()]

    assert sorted(epochs) == list(range(1, 31))
    assert store.stored_epoch() == 30


def test_two_that_initialise_at_once_do_not_replace_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = (CheckpointStore(tmp_path / "checkpoints", RUN) for _ in range(2))
    lock, turns = module._lock, threading.Barrier(2, timeout=30)
    met: list[int] = []

    def together(handle: int, file: Path) -> bool:
        if threading.get_ident() not in met:
            met.append(threading.get_ident())
            turns.wait()
        return lock(handle, file)

    monkeypatch.setattr(module, "_lock", together)
    results: list[str] = []

    def initialise(store: CheckpointStore, now: float) -> None:
        try:
            store.create(spec_of(TENSORS), TENSORS, now=now)
            results.append("made")
        except CheckpointError as error:
            results.append(str(error))

    threads = [threading.Thread(target=initialise, args=(store, n)) for n, store in enumerate([first, second])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)

    assert len(results) == 2
    assert sum("initialised once" in result for result in results) == 1
    assert len(first.files()) == 1


def test_a_lock_whose_holder_hangs_is_named_and_cured_by_its_end(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = store.claim()
    monkeypatch.setattr(module, "LOCK_SECONDS", 0.05)

    with (store.folder / "lock").open("ab") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        for attempt in (lambda: store.write(snapshot), CheckpointStore(store.folder, RUN).claim):
            with pytest.raises(CheckpointNotWritten, match=r"held .* by another process, which hangs.*kill it"):
                attempt()

    monkeypatch.undo()
    store.write(snapshot)
    assert store.claim().epoch == 2


def test_a_file_system_without_locks_is_named(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_handle: int, _how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)

    with pytest.raises(CheckpointNotWritten, match="file system with flock"):
        store.claim()


@pytest.mark.parametrize("content", [b"", b"two\n", b"\xff\xff"])
def test_an_epoch_file_that_is_damaged_says_what_to_do_and_that_cures_it(
    store: CheckpointStore, content: bytes
) -> None:
    store.write(store.claim())
    file = store.folder / "epoch"
    file.write_bytes(content)

    for attempt in (store.claim, lambda: store.write(store.load())):
        with pytest.raises(CheckpointCorrupt, match=r"epoch is damaged.*Stop all aggregators.*delete the file"):
            attempt()
    file.unlink()

    # Above the checkpoint's.
    assert store.claim().epoch == 2


def test_an_epoch_file_that_is_gone_is_made_up_for_by_what_was_seen(store: CheckpointStore) -> None:
    store.write(store.claim())
    (store.folder / "epoch").unlink()

    with pytest.raises(CheckpointOutdated, match="--accept-older"):
        store.claim(epoch=7)
    assert not (store.folder / "epoch").exists()
    assert store.claim(epoch=7, accept_older=True).epoch == 8


def test_an_epoch_file_that_cannot_be_read_now_is_tried_again_later(store: CheckpointStore) -> None:
    snapshot = store.claim()
    file = store.folder / "epoch"
    file.unlink()
    file.mkdir()

    with pytest.raises(CheckpointNotWritten, match="Is a directory"):
        store.write(snapshot)

    file.rmdir()
    store.write(snapshot)


# --------------------------------------------------------------------------------------------- old copies


@pytest.mark.parametrize(("epoch", "version"), [(0, 3), (5, 0), (5, 3)])
def test_a_state_that_is_older_than_what_was_seen_is_refused_and_untouched(
    store: CheckpointStore, epoch: int, version: int
) -> None:
    store.claim()
    before = {file.name: file.read_bytes() for file in store.folder.iterdir()}

    with pytest.raises(CheckpointOutdated, match=r"holds version 0.*old copy restored.*--accept-older"):
        store.claim(epoch=epoch, version=version)

    assert {file.name: file.read_bytes() for file in store.folder.iterdir()} == before


def test_an_older_state_that_is_accepted_goes_on_under_numbers_that_nobody_has_seen(store: CheckpointStore) -> None:
    snapshot = store.claim(epoch=5, version=3, now=9.0, accept_older=True)

    assert (snapshot.epoch, snapshot.version, snapshot.void) == (6, 4, ((1, 3),))
    # Durable before anybody hears of it.
    assert bits(CheckpointStore(store.folder, RUN).load()) == bits(snapshot)


def test_the_history_tells_the_next_start_which_epoch_and_time_it_has_seen(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.open((), epoch=3, version=0, now=1000.0)
    history.open((), epoch=4, version=0, now=900.0)
    with history.file.open("a") as file:
        file.write('{"kind": "version", "version": null, "epoch": "x", "time": true}\n{"kind": "st')

    again = History(history.file)
    again.mend()

    assert (again.last_version, again.last_epoch, again.last_time) == (0, 4, 1000.0)
    assert history.file.read_bytes().endswith(b"\n")
