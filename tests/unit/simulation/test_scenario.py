"""What a scenario may say, and what is refused before anything happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker.errors import ConfigError
from fedmq.simulation.scenario import load_scenario
from tests.support.scenarios import scenario_of, written


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"run.updates": None}, "nothing ends this scenario"),
        ({"run.sed": 1}, r"unknown key 'run.sed' \(did you mean 'seed'\?\)"),
        ({"populaton.workers": 1}, r"unknown key 'populaton.workers' \(did you mean 'population'\?\)"),
        ({"population.speed": "lognormel"}, "population.speed = 'lognormel': .*'lognormal'"),
        ({"aggregator.buffer_size": 13, "aggregator.updates_per_version": 1}, "buffer_size = 13 can never be reached"),
        ({"aggregator.rounds": "synchronous", "aggregator.minimum_updates": 13}, "minimum_updates = 13 can never be"),
        ({"aggregator.version_codec": "bf16"}, "version_codec is not simulated"),
        ({"aggregator.control_variates": True}, "control_variates is not simulated"),
        ({"aggregator.update_seconds": 3.0}, "update_seconds is not simulated"),
        ({"aggregator.evaluate_every": 3}, "evaluate_every is not simulated"),
        ({"aggregator.worker_momentum": 0.5}, "worker_momentum is for workers that train a task"),
        ({"aggregator.update_codec": "bf16", "run.wire": False}, "no effect without the wire"),
        ({"worker.name": "me"}, "worker.name means nothing in a simulation"),
    ],
)
def test_what_cannot_work_is_refused_with_a_reason(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        scenario_of(tmp_path, changes)


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing\.toml: no such file"):
        load_scenario(tmp_path / "missing.toml")


def test_flags_take_precedence_and_change_the_digest(tmp_path: Path) -> None:
    file = written(tmp_path)

    plain, changed = load_scenario(file), load_scenario(file, [("run.seed", "3")])

    assert (plain.run.seed, changed.run.seed) == (0, 3)
    assert plain.digest != changed.digest == load_scenario(file, [("run.seed", "3")]).digest
