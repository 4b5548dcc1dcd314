"""Somebody sets the clock back between two starts: a warning, times that fall, and nothing else."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from aggregator import reign
from aggregator.agreement import Agreement
from aggregator.config import AggregatorConfig
from aggregator.history import History
from tests.support.runfolder import RunFolder


@pytest.fixture
def place(tmp_path: Path) -> RunFolder:
    place = RunFolder(tmp_path)
    place.start(now=time.time())
    return place


def claim(place: RunFolder) -> None:
    """As a service does whose turn it is."""
    reign.claim(
        AggregatorConfig(),
        place.store,
        History(place.folder / "history.jsonl"),
        place.folder,
        newest=(0, 0),
        now=time.time(),
        accept_older=False,
        drop_changes=False,
    )


@pytest.mark.parametrize("told", ["only by the history", "only by the checkpoint"])
def test_a_clock_that_was_set_back_is_said_and_the_run_goes_on(place: RunFolder, caplog: Any, told: str) -> None:
    history = place.folder / "history.jsonl"
    if told == "only by the history":
        with history.open("a") as file:
            file.write(json.dumps({"kind": "start", "epoch": 1, "version": 0, "time": time.time() + 1e6}) + "\n")
    else:
        place.start(now=time.time() + 1e6)
        place.update(0)
        place.update(1)
        history.unlink()

    claim(place)

    assert "the clock says" in caplog.text
    assert "times in the history fall" in caplog.text


def test_a_clock_that_goes_on_is_not_mentioned(place: RunFolder, caplog: Any) -> None:
    claim(place)

    assert "clock" not in caplog.text


def test_times_that_fall_change_nothing_else(place: RunFolder) -> None:
    place.update(0)
    place.update(1)

    place.start(now=3.0)
    place.update(2)
    place.update(3)

    snapshot = place.store.load()
    agreement = Agreement(snapshot)
    agreement.read(place.folder / "history.jsonl")
    assert (agreement.problems, agreement.versions, snapshot.version, snapshot.epoch) == ([], 2, 2, 2)
    lines = [json.loads(line) for line in (place.folder / "history.jsonl").read_text().splitlines()]
    times = [line["time"] for line in lines if line["kind"] == "start"]
    assert times[0] > times[1]
