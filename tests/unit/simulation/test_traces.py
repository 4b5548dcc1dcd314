"""What has happened, simulated."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from aggregator.core.snapshot import Entry, VersionRecord
from aggregator.history import version_line
from broker.errors import ConfigError
from broker.messages import UpdateId
from fedmq.simulation.run import simulate
from fedmq.simulation.traces import load_trace
from tests.support.scenarios import scenario_of

#: Bases of the updates of five versions, made at these times; worker i trains the i-th.
BASES = [[0, 0, 0], [1, 0, 1], [2, 2, 1], [3, 0, 3], [4, 4, 4]]
TIMES = [100.0, 100.5, 103.0, 103.0, 110.0]


def history(folder: Path) -> Path:
    lines = []
    for version, (bases, time) in enumerate(zip(BASES, TIMES, strict=True), 1):
        entries = tuple(
            Entry(UpdateId(f"site{number}", "i", version), base, version - 1 - base, 1.0, 1)
            for number, base in enumerate(bases)
        )
        record = VersionRecord(version, 1, time, 2.0, entries, None, "", "")
        lines.append(json.dumps(version_line(record)))
    (folder / "history.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def test_the_same_rules_meet_the_same_staleness_and_close_the_same_rounds(tmp_path: Path) -> None:
    changes = {"population.trace": str(history(tmp_path)), "aggregator.buffer_size": 3, "run.updates": None}

    result = simulate(scenario_of(tmp_path, changes))

    assert result.ended == "trace"
    assert (result.versions, result.updates) == (5, 15)
    assert dict(result.staleness) == {0: 11, 1: 2, 3: 1} | {0: 12, 1: 2, 3: 1}
    assert result.seconds == pytest.approx(12.0, abs=0.001)


def test_other_rules_meet_the_same_moments(tmp_path: Path) -> None:
    changes = {"population.trace": str(history(tmp_path)), "aggregator.buffer_size": 1, "run.updates": None}

    result = simulate(scenario_of(tmp_path, changes))

    assert (result.versions, result.updates) == (15, 15)
    assert sum(s * n for s, n in result.staleness.items()) > 15


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_a_table_of_trainings(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "t.csv"
    file.write_text("worker,start,end\nb,0,2.5\na,0,1\na,1,3\n", encoding=encoding)

    result = simulate(scenario_of(tmp_path, {"population.trace": str(file), "aggregator.buffer_size": 1}))

    assert load_trace(file).names == ["a", "b"]
    assert dict(result.staleness) == {0: 1, 1: 2}
    assert result.seconds == 3.0


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("worker,start\na,0\n", "line 2: no column 'end'"),
        ("worker,start,end\na,0,1\na,2,1\n", "line 3: start and end must be seconds"),
        ("worker,start,end\na b,0,1\n", "line 2: worker"),
        ("worker,start,end\n", "tells of no update"),
        (None, "there is no .*trace.csv: name a run's folder"),
    ],
)
def test_a_table_that_makes_no_sense_is_refused(tmp_path: Path, text: str | None, complaint: str) -> None:
    if text is not None:
        (tmp_path / "trace.csv").write_text(text)

    with pytest.raises(ConfigError, match=complaint):
        load_trace(tmp_path / "trace.csv")


def test_a_buffer_larger_than_the_trace_is_refused(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"population.trace": str(history(tmp_path)), "aggregator.buffer_size": 16}

    with pytest.raises(ConfigError, match="buffer_size = 16 can never be reached: the trace has 15 updates"):
        simulate(scenario_of(tmp_path, changes))
