"""Kept updates that are damaged or missing are seen by ``fedmq checkpoint verify``, and sound ones are not blamed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from aggregator.archive import base_file
from aggregator.verification import Verification
from tests.support.ondisk import OnDisk

MODEL = {"w": np.arange(4, dtype=np.float32)}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[OnDisk]:
    """Two versions, one update in the buffer, all durable."""
    run = OnDisk(tmp_path / "run", MODEL)
    run.round("a", "b", "a", "b", "a")
    run.tick(100)
    run.settle()
    yield run
    run.close()


def found(run: OnDisk) -> list[str]:
    checked = Verification(run.folder, run.store)
    checked.files(lambda *_: None)
    checked.history()
    checked.kept()
    return [str(finding) for finding in checked.findings]


def test_sound_ones_are_not_blamed_also_if_they_are_kept_from_the_middle_of_a_round_on(run: OnDisk) -> None:
    assert found(run) == []
    run.restart(keep_updates=False)
    run.round("b", "a")
    run.tick(100)
    run.settle()
    run.restart(keep_updates=True)
    run.round("b", "a")
    run.restart()
    run.round("b")
    assert run.store.load().kept_from == 3
    assert found(run) == []


def test_a_flipped_bit_is_seen(run: OnDisk) -> None:
    (file,) = (run.folder / "updates").glob("*.log")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    (text,) = found(run)

    assert f"{file}: the record at byte " in text
    assert "does not match its checksum: restore the folder 'updates' from a backup" in text


def test_applied_updates_that_are_missing_are_seen(run: OnDisk) -> None:
    (file,) = (run.folder / "updates").glob("*.log")
    file.write_bytes(file.read_bytes()[:-1])
    (text,) = found(run)
    assert "1 updates are not in" in text
    assert "a/i/2 (in the buffer); " in text
    assert "cannot be read from byte" in text

    file.unlink()
    (text,) = found(run)
    assert "5 updates are not in" in text
    assert "a/i/0 (version 1)" in text


def test_a_damaged_base_is_seen(run: OnDisk) -> None:
    base = base_file(run.folder / "updates", 0)
    base.write_bytes(base.read_bytes()[:-1])

    (text,) = found(run)

    assert f"{base} cannot be read" in text
    assert "replays begin with another" in text
