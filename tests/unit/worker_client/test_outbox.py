from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten, WrongRun
from broker.messages import UpdateId
from worker_client.outbox import Outbox

ROOT = Path(__file__).resolve().parents[3]


def content(folder: Path) -> dict[str, object]:
    return json.loads((folder / "outbox.json").read_bytes())  # type: ignore[no-any-return]


def test_numbers_count_up_within_an_incarnation(tmp_path: Path) -> None:
    outbox = Outbox.open(tmp_path / "new" / "w0", "run", "w0")

    assert [outbox.next_id() for _ in range(3)] == [UpdateId("w0", outbox.incarnation, n) for n in range(3)]


def test_an_id_is_on_disk_before_it_is_given_out(tmp_path: Path) -> None:
    outbox = Outbox.open(tmp_path, "run", "w0")

    update = outbox.next_id()

    assert content(tmp_path)["next_seq"] == update.seq + 1


def test_each_opening_is_a_new_incarnation_that_knows_what_the_former_ones_confirmed(tmp_path: Path) -> None:
    first = Outbox.open(tmp_path, "run", "w0")
    for update in [first.next_id() for _ in range(3)]:
        first.confirm(update)
    first.close()
    second = Outbox.open(tmp_path, "run", "w0")
    given = second.next_id()
    second.confirm(given)
    second.close()

    third = Outbox.open(tmp_path, "run", "w0")

    assert given == UpdateId("w0", second.incarnation, 0)
    assert len({first.incarnation, second.incarnation, third.incarnation}) == 3
    assert (third.confirmed, third.former) == (0, {first.incarnation: 3, second.incarnation: 1})


def test_a_folder_restored_from_an_old_copy_repeats_no_id(tmp_path: Path) -> None:
    first = Outbox.open(tmp_path / "w0", "run", "w0")
    first.next_id()
    first.close()
    shutil.copytree(tmp_path / "w0", tmp_path / "copy")
    again = Outbox.open(tmp_path / "w0", "run", "w0")
    given = [again.next_id() for _ in range(3)]
    again.close()
    shutil.rmtree(tmp_path / "w0")
    shutil.copytree(tmp_path / "copy", tmp_path / "w0")

    restored = Outbox.open(tmp_path / "w0", "run", "w0")

    assert not {restored.next_id() for _ in range(3)} & set(given)


def test_what_was_told_of_a_former_incarnation_is_forgotten(tmp_path: Path) -> None:
    first = Outbox.open(tmp_path, "run", "w0")
    first.confirm(first.next_id())
    first.close()
    second = Outbox.open(tmp_path, "run", "w0")

    second.told([first.incarnation, "unknown"])
    second.close()

    assert Outbox.open(tmp_path, "run", "w0").former == {}


def test_a_confirm_is_noted_at_once_and_one_that_cannot_be_noted_costs_nothing(tmp_path: Path) -> None:
    outbox = Outbox.open(tmp_path, "run", "w0")
    outbox.confirm(outbox.next_id())
    assert content(tmp_path)["confirmed"] == 1
    update = outbox.next_id()
    (tmp_path / "outbox.tmp").mkdir()  # where the file that is written first would stand

    outbox.confirm(update)

    assert (content(tmp_path)["confirmed"], outbox.confirmed) == (1, 2)


def test_many_lives_that_confirmed_nothing_leave_nothing_to_tell(tmp_path: Path) -> None:
    for _ in range(5):
        Outbox.open(tmp_path, "run", "w0").close()

    assert Outbox.open(tmp_path, "run", "w0").former == {}


def test_a_confirm_of_another_incarnation_does_not_count(tmp_path: Path) -> None:
    outbox = Outbox.open(tmp_path, "run", "w0")

    outbox.confirm(UpdateId("w0", "other", 0))

    assert outbox.confirmed == 0


@pytest.mark.parametrize(("run", "worker"), [("other", "w0"), ("run", "w1")])
def test_the_folder_of_another_run_or_worker_is_refused_and_left_as_it_is(
    tmp_path: Path, run: str, worker: str
) -> None:
    Outbox.open(tmp_path, "run", "w0").close()
    before = content(tmp_path)

    with pytest.raises(WrongRun, match=r"belongs to worker 'w0' of run 'run'.*its own folder"):
        Outbox.open(tmp_path, run, worker)

    assert content(tmp_path) == before
    Outbox.open(tmp_path, "run", "w0").close()  # the refusal has let go of the lock


def test_two_processes_with_one_name_are_refused_until_one_leaves(tmp_path: Path) -> None:
    first = Outbox.open(tmp_path, "run", "w0")

    with pytest.raises(CheckpointError, match="another process runs as worker 'w0'"):
        Outbox.open(tmp_path, "run", "w0")

    first.close()
    Outbox.open(tmp_path, "run", "w0").close()


@pytest.mark.parametrize(
    "damage",
    [b"", b"{", b"[]", b"\xff\xfe", b'{"format": 1}', b'{"format": 1, "run": "run", "worker": "w0", "next_seq": -1}'],
)
def test_a_damaged_file_is_told_and_stops_nobody(
    tmp_path: Path, damage: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    first = Outbox.open(tmp_path, "run", "w0")
    given = first.next_id()
    first.close()
    (tmp_path / "outbox.json").write_bytes(damage)

    with caplog.at_level(logging.WARNING):
        second = Outbox.open(tmp_path, "run", "w0")

    assert second.incarnation != given.incarnation
    assert "outbox.json is damaged" in caplog.text


def test_a_file_of_a_newer_release_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "outbox.json").write_text('{"format": 2, "shape": "unknown"}')

    with pytest.raises(CheckpointCorrupt, match="newer release"):
        Outbox.open(tmp_path, "run", "w0")

    assert content(tmp_path) == {"format": 2, "shape": "unknown"}


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    with pytest.raises(CheckpointNotWritten, match="must be able to write there"):
        Outbox.open(tmp_path / "file" / "w0", "run", "w0")


def test_an_id_that_cannot_be_made_durable_is_not_given_out(tmp_path: Path) -> None:
    outbox = Outbox.open(tmp_path, "run", "w0")
    (tmp_path / "outbox.tmp").mkdir()  # in the way of the file that is written first

    with pytest.raises(CheckpointNotWritten):
        outbox.next_id()

    (tmp_path / "outbox.tmp").rmdir()
    assert outbox.next_id().seq == 1


def test_without_a_folder_each_worker_is_a_new_one() -> None:
    one, two = Outbox.open(None, "run", "w0"), Outbox.open(None, "run", "w0")

    assert one.incarnation != two.incarnation
    assert [one.next_id().seq, one.next_id().seq] == [0, 1]


USE_IDS = """
import sys
from pathlib import Path
from worker_client.outbox import Outbox
outbox = Outbox.open(Path(sys.argv[1]), "run", "w0")
while True:
    update = outbox.next_id()
    print(update, flush=True)
    outbox.confirm(update)
"""


def test_after_kill_9_at_any_moment_no_id_comes_twice(tmp_path: Path) -> None:
    # Given a process that takes ids as fast as it can, killed again and again after some of them
    seen: list[str] = []
    for wanted in (2, 2, 3, 5, 8, 13, 21, 34, 40, 41):  # with the second id the first is noted as confirmed
        process = subprocess.Popen(
            [sys.executable, "-c", USE_IDS, str(tmp_path)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT)},
        )
        with process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(wanted)]
            # When
            process.send_signal(signal.SIGKILL)
            lines += process.stdout.readlines()
            assert process.wait() == -signal.SIGKILL
        seen += [line for line in lines if line.endswith("\n")]

    # Then
    assert len(seen) >= 168
    assert len(set(seen)) == len(seen)
    former = Outbox.open(tmp_path, "run", "w0").former
    assert len(former) == len({line.split("/")[1] for line in seen}) == 10  # no file was ever torn
