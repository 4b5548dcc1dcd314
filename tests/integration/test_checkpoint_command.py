"""``fedmq checkpoint`` as a process: without a broker, and without torch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.support.commands import ROOT, Done, assert_one_message, fedmq
from tests.support.runfolder import TENSORS, RunFolder

RUN = "mine"


@pytest.fixture
def place(tmp_path: Path) -> RunFolder:
    place = RunFolder(tmp_path / "runs" / RUN, run=RUN)
    place.start()
    for seq in range(5):
        place.update(seq)
    return place


def checkpoint(folder: Path, *arguments: str) -> Done:
    return fedmq(folder, "checkpoint", *arguments, "--run", RUN)


def contents(folder: Path) -> dict[Path, bytes]:
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_list_has_a_line_for_each_file_and_changes_nothing(tmp_path: Path, place: RunFolder) -> None:
    before = contents(place.folder)

    done = checkpoint(tmp_path, "list")

    assert done.code == 0, done.err
    rows = [line.split() for line in done.out.splitlines()]
    assert rows[0][:5] == ["file", "version", "epoch", "buffered", "applied"]
    assert rows[0][-1] == "state"
    assert [(row[:5], row[-1]) for row in rows[1:]] == [
        (["0000000006.safetensors", "2", "1", "1", "5"], "whole"),
        (["0000000005.safetensors", "2", "1", "0", "4"], "whole"),
        (["0000000004.safetensors", "1", "1", "1", "3"], "whole"),
    ]
    listed = json.loads(checkpoint(tmp_path, "list", "--json").out)
    assert [(row["file"], row["version"], row["state"]) for row in listed] == [
        (row[0], int(row[1]), "whole") for row in rows[1:]
    ]
    assert contents(place.folder) == before


def test_show_tells_all_that_is_in_one(tmp_path: Path, place: RunFolder) -> None:
    before = contents(place.folder)

    done = checkpoint(tmp_path, "show")

    assert done.code == 0, done.err
    for words in ("0000000006.safetensors", "w0/i/4", "0-4", "float32", "momentum", "12"):
        assert words in done.out, done.out
    assert "taken back versions  -" in done.out
    found = json.loads(checkpoint(tmp_path, "show", "--json", "--version", "1").out)
    assert (found["file"], found["version"]) == ("0000000004.safetensors", 1)
    path = str(place.store.files()[1])
    for name in ("0000000005.safetensors", path):
        assert json.loads(checkpoint(tmp_path, "show", name, "--json").out)["buffer"]["updates"] == 0
    assert contents(place.folder) == before


def test_verify_is_quiet_about_a_sound_run_and_exits_with_5_for_a_damaged_one(tmp_path: Path, place: RunFolder) -> None:
    done = checkpoint(tmp_path, "verify")
    assert (done.code, done.err) == (0, ""), done
    assert "history.jsonl: 2 versions and the buffer tell of 5 updates, each once" in done.out

    newest, older, _ = place.store.files()
    content = bytearray(older.read_bytes())
    content[-3] ^= 8
    older.write_bytes(content)
    history = place.folder / "history.jsonl"
    history.write_text(
        "".join(line for line in history.read_text().splitlines(keepends=True) if '"version": 1,' not in line)
    )
    before = contents(place.folder)

    done = checkpoint(tmp_path, "verify")

    assert_one_message(done, 5, "3 things are wrong", RUN)
    assert f"{newest.name}: whole" in done.out
    assert f"{older.name}: damaged" in done.out
    assert "the checksum does not match" in done.out
    assert "no line tells of version 1" in done.out
    assert "2 applied updates are told of nowhere: w0/i/0, w0/i/1" in done.out
    assert contents(place.folder) == before


def test_verify_says_that_an_old_copy_was_restored(tmp_path: Path, place: RunFolder) -> None:
    for file in place.store.files()[:2]:
        file.unlink()

    done = checkpoint(tmp_path, "verify")

    assert_one_message(done, 5, "one thing is wrong")
    assert "tells of version 2, and the newest checkpoint has 1: an old copy was restored" in done.out
    assert "fedmq aggregator --accept-older" in done.out
    assert "by itself" not in done.out + done.err


def test_verify_says_that_an_aggregator_falls_back_behind_damage_by_itself(tmp_path: Path, place: RunFolder) -> None:
    for file in place.store.files()[:2]:
        file.write_bytes(file.read_bytes()[:-1])

    done = checkpoint(tmp_path, "verify")

    assert_one_message(done, 5, "2 things are wrong")
    assert done.out.count("falls back to 0000000004.safetensors (version 1) by itself") == 2
    assert "accept-older" not in done.out + done.err


def test_verify_says_what_a_damaged_line_means(tmp_path: Path, place: RunFolder) -> None:
    history = place.folder / "history.jsonl"
    whole = history.read_text()
    history.write_text("{no\n" + whole)
    done = checkpoint(tmp_path, "verify", "--json")
    assert_one_message(done, 5, "one thing is wrong")
    (finding,) = json.loads(done.out)["findings"]
    assert finding["what"] == "history.jsonl: the line at byte 0 is damaged"
    assert "it told of no version" in finding["todo"]
    assert "delete it while no aggregator runs" in finding["todo"]

    history.write_text("".join("{" * ('"version": 1,' in line) + line for line in whole.splitlines(keepends=True)))
    done = checkpoint(tmp_path, "verify")
    assert_one_message(done, 5, "3 things are wrong")
    assert "no line tells of version 1: restore history.jsonl from a backup" in done.out
    assert "told of no version" not in done.out


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.full((3, 4), -1.0))
        self.b = nn.Parameter(torch.full((3,), -1.0))


def test_export_is_what_torch_loads_in_one_line(tmp_path: Path, place: RunFolder) -> None:
    newest, other = Net(), Net()

    done = checkpoint(tmp_path, "export")
    assert done.code == 0, done.err
    assert "version 2" in done.out
    newest.load_state_dict(load_file(tmp_path / "model.safetensors"))
    done = checkpoint(tmp_path, "export", "--version", "1", "--output", "first.safetensors")
    assert done.code == 0, done.err
    other.load_state_dict(load_file(tmp_path / "first.safetensors"))

    assert torch.equal(newest.w, torch.from_numpy(place.machine.parameters["w"].copy()))
    assert not torch.equal(newest.w, other.w)
    assert other.b.shape == TENSORS["b"].shape


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("list", "--folder", "elsewhere"), 5, ["elsewhere/checkpoints", "--run", "--folder"]),
        (("list", "--json", "--folder", "elsewhere"), 5, ["elsewhere/checkpoints"]),
        (("show", "--folder", "elsewhere"), 5, ["no checkpoint"]),
        (("verify", "--folder", "elsewhere"), 5, ["no checkpoint"]),
        (("export", "--folder", "elsewhere"), 5, ["no checkpoint"]),
        (("export", "--version", "9"), 5, ["version 9", "there: 1, 2", "keep_checkpoints", "fedmq replay"]),
        (("show", "--version", "9"), 5, ["there: 1, 2"]),
        (("show", "0000000099.safetensors"), 2, ["0000000099.safetensors", "0000000006.safetensors"]),
        (("show", "0000000006.safetensors", "--version", "1"), 2, ["not both"]),
        (("export", "--output", "."), 2, ["is a folder"]),
        (("export", "--output", "nowhere/model.safetensors"), 5, ["nowhere/model.safetensors", "--output"]),
    ],
)
def test_a_mistake_is_one_message(
    tmp_path: Path, place: RunFolder, arguments: tuple[str, ...], code: int, words: list[str]
) -> None:
    assert_one_message(checkpoint(tmp_path, *arguments), code, *words)


def test_another_runs_folder_is_named(tmp_path: Path, place: RunFolder) -> None:
    wrong = ("--run", "other", "--folder", str(place.folder))
    done = fedmq(tmp_path, "checkpoint", "list", *wrong)
    assert "another run" in done.out
    assert_one_message(done, 5, "holds run 'mine', not 'other'")
    for command in ("show", "verify", "export"):
        done = fedmq(tmp_path, "checkpoint", command, *wrong)
        assert done.code == 5, done
        assert "holds run 'mine', not 'other'" in done.err + done.out


def test_a_damaged_file_is_not_shown_or_exported(tmp_path: Path, place: RunFolder) -> None:
    for file in place.store.files():
        file.write_bytes(file.read_bytes()[:-1])

    for command in ("show", "export"):
        assert_one_message(checkpoint(tmp_path, command), 5, "0000000006.safetensors", "restore one from a backup")
    assert_one_message(checkpoint(tmp_path, "show", "0000000005.safetensors"), 5, "cannot be read")
    assert not (tmp_path / "model.safetensors").exists()


def test_it_works_where_torch_is_not_installed(tmp_path: Path, place: RunFolder) -> None:
    """As in the aggregator's image, where torch is not installed."""
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError('no torch here', name='torch')")
    done = fedmq(tmp_path, "checkpoint", "list", "--run", RUN, environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"})
    assert done.code == 0, done.err
