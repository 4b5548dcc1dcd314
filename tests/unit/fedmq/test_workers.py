"""What is told of workers: from a run's history, its newest checkpoint and its contributions."""

from __future__ import annotations

import json
import math
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from aggregator.core.standing import Standing
from aggregator.tally import rows_of, tallied
from tests.support.builders import snapshot_of, vector
from tests.support.commands import fedmq
from tests.support.ondisk import OnDisk


def test_a_run_with_good_bad_and_absent_workers(tmp_path: Path) -> None:
    run = OnDisk(tmp_path, {"w": vector(0, 0)}, quarantine_score=1.5)
    for _ in range(2):
        run.publish("good", {"w": vector(1, 2)})
        run.publish("other", {"w": vector(2, 4)})
        run.publish("bad", {"w": vector(math.nan, 0)})
        run.settle()
    run.close()
    (tmp_path / "contribution.json").write_text(json.dumps({"workers": [{"worker": "good", "contribution": 0.25}]}))
    options = ("--run", "test", "--folder", str(tmp_path))

    done = fedmq(tmp_path, "workers", *options, "--json")

    assert done.code == 0, done
    rows = {row["worker"]: row for row in json.loads(done.out)}
    assert set(rows) == {"good", "other", "bad"}
    good, bad = rows["good"], rows["bad"]
    assert (good["updates"], good["examples"], good["newest"], good["rejected"]) == (2, 2, 2, {})
    assert (good["share"], bad["share"], bad["time"]) == (0.5, 0.0, None)
    assert datetime.fromisoformat(good["time"]).timestamp() == pytest.approx(run.lines()[-1]["time"], abs=0.01)
    assert (good["contribution"], good["score"], good["present"]) == (0.25, 0.0, True)
    assert round(good["cosine"], 3) == 1.0
    assert round(good["norm"], 3) == 2.236
    assert (bad["updates"], bad["rejected"]) == (0, {"not-finite": 2})
    assert bad["score"] > 1.5
    assert bad["quarantined_until"] == 3601.0


def test_what_was_taken_back_is_not_counted() -> None:
    lines = [
        {"kind": "version", "version": version, "time": 100.0 + version, "updates": [{"worker": w} for w in "abb"]}
        for version in (1, 2, 3)
    ]

    tallies = tallied(lines, {1: {"a", "b"}, 3: {"a"}})

    assert {worker: (tally.updates, tally.newest, tally.time) for worker, tally in tallies.items()} == {
        "a": (2, 3, 103.0),
        "b": (2, 1, 101.0),
    }


def test_lines_that_are_damaged_and_figures_that_are_not_there_are_passed_over() -> None:
    entries = [{"worker": "a", "staleness": 1}, "x", {"worker": "a", "cosine": "?"}]
    lines: list[dict[str, Any]] = [
        {"kind": "version", "version": 3, "updates": entries},
        {"kind": "version", "version": "4", "updates": []},
        {"kind": "version", "version": 5},
        {"kind": "start"},
    ]

    tallies = tallied(lines)

    assert (tallies["a"].updates, tallies["a"].newest) == (2, 3)
    assert (tallies["a"].mean("staleness"), tallies["a"].mean("cosine")) == (1.0, None)


def test_the_pace_is_seconds_for_a_step() -> None:
    entries = [{"worker": "a", "steps": 4, "seconds": 2.0}, {"worker": "a", "steps": 10, "seconds": 15.0}]
    nothing = [
        {"worker": "b", "steps": 0, "seconds": 2.0},
        {"worker": "b", "steps": 4, "seconds": "?"},
        {"worker": "b"},
    ]

    tallies = tallied([{"kind": "version", "version": 3, "updates": [*entries, *nothing]}])

    assert (tallies["a"].mean("steps"), tallies["a"].mean("pace")) == (7.0, 1.0)
    assert tallies["b"].mean("pace") is None


def test_scores_are_those_of_the_newest_version() -> None:
    snapshot = snapshot_of({"w": vector(0)})
    head = type(snapshot)(
        **{name: getattr(snapshot, name) for name in type(snapshot).__dataclass_fields__}
        | {"version": 10, "standings": {"w0": Standing(score=4.0, version=0)}, "trainers": ("w1",)}
    )

    rows = rows_of({}, head, 5, {})

    assert [(row["worker"], row["score"], row["present"]) for row in rows] == [("w0", 1.0, False), ("w1", 0.0, True)]
