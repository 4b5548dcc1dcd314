"""What a scenario may say, and what is refused before anything happens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from broker.errors import ConfigError, FedmqError
from fedmq.simulation.run import simulate
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
        (
            {"aggregator.buffer_size": 13, "aggregator.one_per_worker": True},
            "by aggregator.one_per_worker each of 12 wo",
        ),
        (
            {"aggregator.buffer_size": 50, "aggregator.worker_share": 0.08},
            "each of 12 workers may have 4 in a buffer, 48 i",
        ),
        ({"aggregator.rounds": "synchronous", "aggregator.minimum_updates": 13}, "minimum_updates = 13 can never be"),
        ({"aggregator.version_codec": "bf16"}, "version_codec is not simulated"),
        ({"aggregator.control_variates": True}, "control_variates is not simulated"),
        ({"aggregator.update_seconds": 3.0}, "update_seconds is not simulated"),
        ({"aggregator.evaluate_every": 3}, "evaluate_every is not simulated"),
        ({"aggregator.worker_momentum": 0.5}, "worker_momentum is for workers that train a task"),
        ({"aggregator.update_codec": "bf16", "run.wire": False}, "no effect without the wire"),
        ({"attack.kind": "sign-flip"}, "attack.kind = 'sign-flip', and nobody attacks: set attack.share"),
        ({"attack.kind": "ipm", "attack.share": 0.05}, "attack.share = 0.05 of 12 workers is nobody"),
        ({"worker.local_parameters": ["8.*"]}, "worker.local_parameters is not simulated"),
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


def test_a_deadline_closes_a_buffer_that_cannot_fill(tmp_path: Path) -> None:
    changes = {"aggregator.buffer_size": 13, "aggregator.one_per_worker": True, "aggregator.deadline": 3.0}

    assert simulate(scenario_of(tmp_path, changes)).updates == 200


def test_memory_that_there_is_not_is_told_by_what_takes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedmq.simulation.run.names_of", range)  # what names take comes before, and there is that
    changes = {"population.workers": 10_000_000, "objective.dimensions": 1_000_000}

    with pytest.raises(FedmqError, match=r"no memory left for 10,000,000 workers of 1,000,000 dimensions .*; take"):
        simulate(scenario_of(tmp_path, changes))
