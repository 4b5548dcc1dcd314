"""Checkpoints: what is written comes back; what is damaged is noticed; who has been replaced cannot write."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from aggregator.checkpoint import CheckpointStore, write_tensors
from aggregator.checkpointfile import contents
from aggregator.core.effects import EvaluationRecord
from aggregator.core.ledger import Ledger
from aggregator.core.rounds import Buffered
from aggregator.core.rules import CommitPolicy
from aggregator.core.snapshot import Snapshot
from aggregator.history import History, read_history
from aggregator.optimizers import Sgd
from broker.errors import (
    CheckpointCorrupt,
    CheckpointError,
    CheckpointMissing,
    CheckpointNotWritten,
    StaleEpoch,
    WrongRun,
)
from broker.messages import UpdateId
from tests.support.builders import RUN, rules_of, spec_of, update_of, vector
from tests.unit.aggregator.driver import Driver

TENSORS = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "half": np.ones(3, ml_dtypes.bfloat16),
    "count": np.array(5, np.int64),
    "empty": np.zeros((0, 3), np.float32),
}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", RUN)
    store.create(spec_of(TENSORS), TENSORS, now=1.0)
    return store


def mid_round(store: CheckpointStore) -> Snapshot:
    """A snapshot with everything in it: versions, momentum, a partial round, rejections."""
    rules = rules_of(
        rounds=Buffered(size=2, max_staleness=9), optimizer=Sgd(0.5, momentum=0.9), commit=CommitPolicy(count=1)
    )
    driver = Driver(rules, store.claim())
    driver.hello("w0")
    for seq in range(3):
        driver.update(update_of({n: np.ones_like(a) for n, a in TENSORS.items()}, seq=seq, metrics={"loss": 0.5}))
    driver.update(update_of({"w": vector(1)}, seq=3))
    driver.goodbye("w0", confirmed=4)
    return driver.machine.snapshot(5.0)


def same(one: Snapshot, other: Snapshot) -> None:
    for field in one.__dataclass_fields__:
        ours, theirs = getattr(one, field), getattr(other, field)
        if field == "parameters":
            assert_same_arrays(ours, theirs)
        elif field == "accumulator":
            assert_same_arrays(ours.tensors, theirs.tensors)
            assert (ours.share, ours.weight, ours.count) == (theirs.share, theirs.weight, theirs.count)
        elif field == "optimizer":
            assert ours.step == theirs.step
            assert ours.slots.keys() == theirs.slots.keys()
            for slot in ours.slots:
                assert_same_arrays(ours.slots[slot], theirs.slots[slot])
        elif field == "sketches":
            assert_same_arrays(dict(enumerate(ours)), dict(enumerate(theirs)))
        else:
            assert ours == theirs, field


def assert_same_arrays(ours: Any, theirs: Any) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert ours[name].dtype == theirs[name].dtype
        assert ours[name].shape == theirs[name].shape
        assert ours[name].tobytes() == theirs[name].tobytes()


def test_everything_comes_back(store: CheckpointStore) -> None:
    snapshot = mid_round(store)

    store.write(snapshot)

    same(snapshot, CheckpointStore(store.folder, RUN).load())


def test_any_tool_can_open_it(store: CheckpointStore) -> None:
    loaded = load_file(store.files()[0])

    assert torch.equal(loaded["parameters/w"], torch.arange(12.0).reshape(3, 4))
    assert loaded["parameters/half"].dtype is torch.bfloat16


def test_tensors_are_written_as_the_library_writes_them(tmp_path: Path) -> None:
    with (tmp_path / "ours").open("wb") as file:
        write_tensors(file, {"b": vector(1, 2), "a": np.array([1], np.int8)}, {"k": "v"})

    theirs = safetensors.numpy.load_file(tmp_path / "ours")

    np.testing.assert_array_equal(theirs["b"], [1, 2])
    np.testing.assert_array_equal(theirs["a"], [1])


def test_two_generations_are_kept(store: CheckpointStore) -> None:
    snapshot = store.claim()

    for _ in range(4):
        store.write(snapshot)

    assert [path.stem for path in store.files()] == ["0000000005", "0000000004"]
    assert not list(store.folder.glob(".*"))


@pytest.mark.parametrize("where", [0, 9, 100, -30, -1])
def test_a_flipped_bit_is_noticed_and_the_previous_generation_used(
    store: CheckpointStore, where: int, caplog: Any
) -> None:
    snapshot = mid_round(store)
    store.write(snapshot)
    newer = store.write(replace(snapshot, version=7))
    content = bytearray(newer.read_bytes())
    content[where] ^= 0x40
    newer.write_bytes(content)

    loaded = CheckpointStore(store.folder, RUN).load()

    assert loaded.version == snapshot.version
    assert "falling back" in caplog.text
    assert "not in the model" in caplog.text


@pytest.mark.parametrize("length", [0, 5, 200, -1])
def test_a_truncated_file_is_noticed(store: CheckpointStore, length: int) -> None:
    file = store.files()[0]
    file.write_bytes(file.read_bytes()[:length])

    with pytest.raises(CheckpointCorrupt, match="backup"):
        store.load()


def test_a_newer_format_says_upgrade(store: CheckpointStore) -> None:
    """And nothing older takes its place: that would drop what was acknowledged."""
    newer = store.folder / "0000000002.safetensors"
    with newer.open("wb") as file:
        write_tensors(file, TENSORS, {"format": "fedmq-checkpoint-9", "seal": "of another kind"})

    with pytest.raises(CheckpointCorrupt, match=r"fedmq-checkpoint-9.*upgrade"):
        store.load()


def test_the_head_is_what_stands_beside_the_tensors(store: CheckpointStore) -> None:
    snapshot = mid_round(store)
    store.write(snapshot)

    head = store.head()

    for field in head.__dataclass_fields__:
        assert getattr(head, field) == getattr(snapshot, field), field


def test_damage_in_a_tensor_is_not_noticed_in_the_head_and_all_other_damage_is(
    store: CheckpointStore, caplog: Any
) -> None:
    snapshot = mid_round(store)
    store.write(snapshot)
    newer = store.write(replace(snapshot, version=7))
    whole = newer.read_bytes()
    for where in (-1, whole.index(b"version") + 2, 3):
        content = bytearray(whole)
        content[where] ^= 0x01
        newer.write_bytes(content)
        caplog.clear()

        assert store.head().version == (7 if where == -1 else snapshot.version)
        assert ("falling back" in caplog.text) == (where != -1)
        assert store.load().version == snapshot.version


def test_the_head_of_a_file_that_is_older_than_its_checksum_is_taken(store: CheckpointStore) -> None:
    arrays, metadata = contents(mid_round(store))
    del metadata["head"]
    with (store.folder / "0000000002.safetensors").open("wb") as file:
        write_tensors(file, arrays, metadata)

    assert store.head().version == store.load().version == 1


def test_a_head_that_cannot_be_used_says_so(store: CheckpointStore, tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="fedmq init --run test"):
        CheckpointStore(tmp_path / "nowhere", RUN).head()
    with pytest.raises(WrongRun, match="holds run 'test', not 'other'"):
        CheckpointStore(store.folder, "other").head()

    file = store.folder / "0000000002.safetensors"
    with file.open("wb") as out:
        write_tensors(out, TENSORS, {"format": "fedmq-checkpoint-9", "seal": "of another kind"})
    with pytest.raises(CheckpointCorrupt, match=r"fedmq-checkpoint-9.*upgrade"):
        store.head()
    file.unlink()
    store.files()[0].write_bytes(b"")
    with pytest.raises(CheckpointCorrupt, match="backup"):
        store.head()


def test_no_checkpoint_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointMissing, match="fedmq init --run test"):
        CheckpointStore(tmp_path, RUN).claim()


def test_another_runs_folder_is_refused(store: CheckpointStore) -> None:
    with pytest.raises(WrongRun, match="holds run 'test', not 'other'"):
        CheckpointStore(store.folder, "other").claim()


def test_a_run_is_initialised_once(store: CheckpointStore) -> None:
    with pytest.raises(CheckpointError, match="once"):
        store.create(spec_of(TENSORS), TENSORS, now=2.0)


def test_each_claim_raises_the_epoch_and_the_older_aggregator_cannot_write(store: CheckpointStore) -> None:
    first, second = CheckpointStore(store.folder, RUN), CheckpointStore(store.folder, RUN)
    old, new = first.claim(), second.claim()
    assert (old.epoch, new.epoch) == (1, 2)

    with pytest.raises(StaleEpoch, match="taken over"):
        first.write(old)
    second.write(new)

    assert second.load().epoch == 2


def test_the_epoch_rises_though_nothing_was_written_in_between(store: CheckpointStore) -> None:
    assert [CheckpointStore(store.folder, RUN).claim().epoch for _ in range(3)] == [1, 2, 3]


def test_a_folder_that_cannot_be_written_is_one_clear_error(store: CheckpointStore, monkeypatch: Any) -> None:
    snapshot = store.claim()
    before = store.files()

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointNotWritten, match=r"No space left on device; make room"):
        store.write(snapshot)
    monkeypatch.undo()

    assert store.files() == before
    assert not list(store.folder.glob(".*"))
    assert store.load().version == 0


def test_a_real_full_disk(store: CheckpointStore) -> None:
    """A process whose files may not grow beyond 4 KiB, which the kernel reports like a full disk."""
    script = (
        "import resource, signal, sys; from pathlib import Path; from dataclasses import replace\n"
        "from aggregator.checkpoint import CheckpointStore; import numpy as np\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "store = CheckpointStore(Path(sys.argv[1]), 'test'); snapshot = store.claim()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))\n"
        "store.write(snapshot)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(store.folder)], capture_output=True, text=True, check=False
    )

    assert "CheckpointNotWritten" in done.stderr
    assert store.load().version == 0


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from("xy"), st.integers(0, 30)), unique=True))
def test_the_ledger_is_a_set(ids: list[tuple[str, str, int]]) -> None:
    ledger = Ledger()
    for worker, incarnation, seq in ids:
        assert UpdateId(worker, incarnation, seq) not in ledger
        ledger.add(UpdateId(worker, incarnation, seq))
        assert UpdateId(worker, incarnation, seq) in ledger

    assert {(i.worker, i.incarnation, i.seq) for i in ledger} == set(ids)
    assert len(ledger) == len(ids)
    assert list(Ledger(json.loads(json.dumps(ledger.to_plain())))) == list(ledger)


def test_a_long_row_of_sequence_numbers_takes_one_interval() -> None:
    ledger = Ledger()
    for seq in (*range(0, 1000, 2), *range(1, 1000, 2)):
        ledger.add(UpdateId("w", "i", seq))

    assert ledger.to_plain() == {"w": {"i": [[0, 999]]}}
    with pytest.raises(ValueError, match="already"):
        ledger.add(UpdateId("w", "i", 5))


def test_history_makes_up_for_lines_that_a_crash_left_out(tmp_path: Path, store: CheckpointStore) -> None:
    """Crash after the checkpoint, before the line; and another in the middle of a line."""
    driver = Driver(rules_of(), store.claim())
    for seq in range(4):
        driver.update(update_of({n: np.ones_like(a) for n, a in TENSORS.items()}, seq=seq))
    records = tuple(driver.records)
    file = tmp_path / "history.jsonl"
    history = History(file)
    history.open((), epoch=1, version=0, now=1.0)
    history.version(records[0])
    with file.open("a") as torn:
        torn.write('{"kind": "vers')

    History(file).open(records, epoch=2, version=2, now=2.0)

    lines = list(read_history(file))
    assert [(line["kind"], line.get("version")) for line in lines] == [
        ("start", 0),
        ("version", 1),
        ("version", 2),
        ("start", 2),
    ]
    assert lines[1]["after"] == lines[2]["before"]


def test_history_is_json_whatever_an_evaluator_says(tmp_path: Path) -> None:
    history = History(tmp_path / "history.jsonl")
    history.evaluation(EvaluationRecord("e", 3, {"loss": float("nan"), "accuracy": 0.5}), now=1.0)

    (line,) = (tmp_path / "history.jsonl").read_text().splitlines()

    assert json.loads(line, parse_constant=pytest.fail)["metrics"] == {"loss": None, "accuracy": 0.5}
