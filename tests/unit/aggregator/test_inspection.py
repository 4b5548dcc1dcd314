"""What is wrong with a run's folder is seen, and what is not wrong is not called so."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.agreement import Agreement
from aggregator.checkpoint import CheckpointStore, write_tensors
from aggregator.core.snapshot import Snapshot
from aggregator.inspection import Condition, check_files, check_snapshot, describe, survey
from aggregator.verification import Verification
from broker.errors import CheckpointCorrupt
from broker.messages import Reason
from tests.support.builders import RUN
from tests.support.runfolder import TENSORS, RunFolder


@pytest.fixture
def place(tmp_path: Path) -> RunFolder:
    """Two versions, the second's checkpoint with a partial round after it; two workers."""
    place = RunFolder(tmp_path)
    place.start()
    for seq in range(3):
        place.update(seq)
    place.update(0, worker="w1")
    place.update(1, worker="w1")
    return place


def wrong(place: RunFolder) -> list[str]:
    """All that ``fedmq checkpoint verify`` would say."""
    checked = Verification(place.folder, place.store)
    checked.files(lambda *_: None)
    checked.history()
    checked.kept()
    return [finding.what for finding in checked.findings]


def test_a_sound_run_has_nothing_wrong(place: RunFolder) -> None:
    assert wrong(place) == []
    facts = [facts for facts, _ in survey(place.store)]
    assert [(f.version, f.epoch, f.buffered, f.applied) for f in facts] == [(2, 1, 1, 5), (2, 1, 0, 4), (1, 1, 1, 3)]
    assert {f.condition for f in facts} == {Condition.WHOLE}


def test_a_new_run_has_nothing_wrong(tmp_path: Path) -> None:
    assert wrong(RunFolder(tmp_path)) == []


def test_a_run_that_was_killed_before_the_history_had_its_line_has_nothing_wrong(place: RunFolder) -> None:
    history = place.folder / "history.jsonl"
    lines = history.read_bytes().splitlines(keepends=True)
    place.update(2, worker="w1")
    history.write_bytes(b"".join(lines) + b'{"kind": "ver')

    assert wrong(place) == []


def test_what_a_running_aggregator_writes_meanwhile_is_not_wrong(place: RunFolder) -> None:
    """The checkpoint was read, then a version was made, then the history was read."""
    snapshot = place.store.load()
    place.update(2, worker="w1")

    agreement = Agreement(snapshot)
    agreement.read(place.folder / "history.jsonl")

    assert (agreement.problems, agreement.newest, agreement.versions) == ([], 3, 2)


def test_a_file_that_is_deleted_while_the_folder_is_read_is_passed_over(place: RunFolder, monkeypatch: Any) -> None:
    read = CheckpointStore.read

    def deleted(store: CheckpointStore, file: Path) -> Snapshot:
        if file == oldest:
            file.unlink()
        return read(store, file)

    oldest = place.store.files()[-1]
    monkeypatch.setattr(CheckpointStore, "read", deleted)

    assert len(list(survey(place.store))) == 2


def test_every_condition_is_named(place: RunFolder) -> None:
    folder = place.store.folder
    first, second, third = place.store.files()
    first.write_bytes(first.read_bytes()[:-1])
    with second.open("wb") as file:
        write_tensors(file, TENSORS, {"format": "fedmq-checkpoint-7"})
    other = RunFolder(folder.parent / "other", run="other")
    shutil.copy(other.store.files()[0], third)
    (folder / "0000000001.safetensors.damaged").write_bytes(b"torn")
    (folder / "0000000009.safetensors").mkdir()
    (folder / "0000000006 (copy).safetensors").write_bytes(b"what an operator left")

    conditions = {facts.file: facts.condition for facts, _ in survey(place.store)}

    assert conditions == {
        "0000000009.safetensors": Condition.UNREADABLE,
        first.name: Condition.DAMAGED,
        second.name: Condition.FOREIGN,
        third.name: Condition.STRANGE,
        "0000000001.safetensors.damaged": Condition.ASIDE,
    }
    for facts, _, problems in check_files(survey(place.store)):
        assert bool(problems) == (facts.condition is not Condition.ASIDE), facts


# -------------------------------------------------------------------- whole files with something wrong in them


def rewritten(place: RunFolder, change: Callable[[Snapshot], Snapshot]) -> None:
    """The newest checkpoint, altered, with a checksum that is right."""
    place.store.save(change(place.store.load()), place.store.files()[0])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda s: replace(s, digest="0" * 64), "do not have the digest"),
        (lambda s: replace(s, parameters={**s.parameters, "b": np.full(3, np.nan, np.float32)}), "not finite in b"),
        (lambda s: replace(s, entries=s.entries * 2), "twice"),
        (lambda s: replace(s, entries=()), "the buffer holds 1 updates, and 0 are listed"),
        (lambda s: replace(s, ledger={}), "not in the ledger"),
        (lambda s: replace(s, ledger={"w0": {"i": [[5, 2]]}}), "out of order"),
        (lambda s: replace(s, ledger={"w0": {"i": [[0, 2], [2, 4]]}}), "out of order"),
        (lambda s: replace(s, folds=((7, {}),)), "settings under which"),
    ],
)
def test_contents_that_contradict_each_other_are_seen(
    place: RunFolder, change: Callable[[Snapshot], Snapshot], words: str
) -> None:
    assert check_snapshot(place.store.load()) == []
    rewritten(place, change)

    assert any(words in problem for problem in check_snapshot(place.store.load()))


def test_a_newer_file_that_lacks_what_an_older_one_has_is_seen(place: RunFolder) -> None:
    files = place.store.files()
    shutil.copy(files[2], files[0].with_name("0000000099.safetensors"))

    problems = wrong(place)

    assert any("whose number is higher" in problem for problem in problems)
    assert any("lacks 2 updates" in problem for problem in problems), problems


@pytest.mark.parametrize("content", [None, b"", b"seven\n", b"0\n"])
def test_an_epoch_file_that_is_lost_damaged_or_too_low_is_seen(place: RunFolder, content: bytes | None) -> None:
    file = place.store.folder / "epoch"
    file.unlink()
    if content is not None:
        file.write_bytes(content)

    (problem,) = wrong(place)

    assert str(file) in problem


# --------------------------------------------------------------------------------- the history against the ledger


def lines_of(place: RunFolder) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place.folder / "history.jsonl").read_text().splitlines()]


def told(place: RunFolder, lines: list[dict[str, Any]]) -> list[str]:
    (place.folder / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return wrong(place)


def test_an_update_that_is_told_twice_is_seen(place: RunFolder) -> None:
    lines = lines_of(place)
    lines[2]["updates"].append(lines[1]["updates"][0])

    (problem,) = told(place, lines)

    assert "w0/i/0 is told of in version 2 and before" in problem


def test_an_update_in_the_buffer_that_a_version_has_too_is_seen(place: RunFolder) -> None:
    lines = lines_of(place)
    lines[2]["updates"].append({**lines[2]["updates"][0], "worker": "w1", "seq": 1})

    (problem,) = told(place, lines)

    assert "w1/i/1 is told of in the buffer and before" in problem


def test_an_applied_update_that_is_told_nowhere_is_seen(place: RunFolder) -> None:
    lines = lines_of(place)
    del lines[1]["updates"][1]

    (problem,) = told(place, lines)

    assert "1 applied updates are told of nowhere: w0/i/1" in problem


def test_an_update_that_is_told_of_and_was_never_applied_is_seen(place: RunFolder) -> None:
    lines = lines_of(place)
    lines[1]["updates"].append({**lines[1]["updates"][0], "seq": 99})

    (problem,) = told(place, lines)

    assert "1 updates are told of and not in the ledger: w0/i/99" in problem


def test_a_line_that_is_missing_damaged_or_doubled_is_seen(place: RunFolder) -> None:
    lines = lines_of(place)

    assert any("no line tells of version 1" in p for p in told(place, [lines[0], lines[2]]))
    assert any("version 1 is told after version 2" in p for p in told(place, [*lines, lines[1]]))
    assert any("damaged: settings" in p for p in told(place, [lines[0], {**lines[1], "settings": 3}, lines[2]]))
    (place.folder / "history.jsonl").write_text("not json\n" + "".join(json.dumps(line) + "\n" for line in lines))
    assert wrong(place) == ["history.jsonl: the line at byte 0 is damaged"]


def test_a_version_that_does_not_begin_where_the_one_before_ended_is_seen(place: RunFolder) -> None:
    lines = lines_of(place)
    lines[1]["after"] = "0" * 64

    assert told(place, lines) == ["version 2 does not begin with the parameters of version 1"]


def test_a_history_that_was_lost_is_seen(place: RunFolder) -> None:
    (place.folder / "history.jsonl").unlink()

    problems = wrong(place)

    # The checkpoint itself still tells of the version that was made last.
    assert any("no line tells of" in problem for problem in problems)
    assert any("applied updates are told of nowhere" in problem for problem in problems)


# --------------------------------------------------------------------------------------- runs that were taken back


def test_a_run_that_went_on_from_last_weeks_state_has_nothing_wrong(place: RunFolder) -> None:
    backup = place.folder / "backup"
    shutil.copytree(place.store.folder, backup)
    for seq in range(2, 7):
        place.update(seq, worker="w1")
    shutil.rmtree(place.store.folder)
    shutil.copytree(backup, place.store.folder)

    place.start(accept_older=True)
    assert place.machine.version == 6  # 5 was the newest that anybody had seen
    place.update(2, worker="w1", base_version=4)
    place.update(3, worker="w1")

    assert place.rejected == [Reason.ROLLED_BACK]
    assert wrong(place) == []
    snapshot = place.store.load()
    agreement = Agreement(snapshot)
    agreement.read(place.folder / "history.jsonl")
    # Of those that were told of after the backup, only the one that came again counts.
    assert agreement.given_up == 4


def test_a_damaged_newest_file_is_set_aside_and_the_run_goes_on_under_a_new_number(place: RunFolder) -> None:
    place.update(2, worker="w1")  # makes version 3
    newest = place.store.files()[0]
    content = bytearray(newest.read_bytes())
    content[-1] ^= 1
    newest.write_bytes(content)

    place.start(newest=(1, 3))

    assert newest.with_name(f"{newest.name}.damaged").exists()
    assert place.machine.version == 4
    place.update(3, worker="w1")
    assert place.machine.version == 5  # the buffer of version 2 was kept
    assert wrong(place) == []
    assert all(np.isfinite(array).all() for array in place.machine.parameters.values())


def test_all_files_damaged_is_one_clear_error_and_nothing_is_begun_anew(place: RunFolder) -> None:
    before = {}
    for file in place.store.files():
        file.write_bytes(file.read_bytes()[:100])
        before[file.name] = file.read_bytes()

    with pytest.raises(CheckpointCorrupt, match="restore one from a backup, or move the folder away"):
        place.start()

    assert {file.name: file.read_bytes() for file in place.store.files()} == before
    assert CheckpointStore(place.store.folder, RUN).stored_epoch() == 1


# ------------------------------------------------------------------------------------------------------- in full


def test_a_checkpoint_is_described_in_full_and_as_json(place: RunFolder) -> None:
    found = json.loads(json.dumps(describe(place.store.load()), allow_nan=False))

    assert (found["run"], found["version"], found["epoch"], found["done"]) == (RUN, 2, 1, False)
    assert [(row["worker"], row["applied"], row["seqs"]) for row in found["ledger"]] == [
        ("w0", 3, [[0, 2]]),
        ("w1", 2, [[0, 1]]),
    ]
    assert [entry["update"] for entry in found["buffer"]["entries"]] == ["w1/i/1"]
    assert found["optimizer"] == {"step": 2, "slots": ["momentum"]}
    assert [(t["name"], t["shape"], t["dtype"], t["not_finite"]) for t in found["tensors"]] == [
        ("w", [3, 4], "float32", 0),
        ("b", [3], "float32", 0),
    ]
    expected = float(np.linalg.norm(place.machine.parameters["w"].astype(np.float64)))
    assert found["tensors"][0]["norm"] == pytest.approx(expected)
