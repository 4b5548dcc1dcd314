"""``fedmq simulate`` as a process."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.commands import assert_one_message, fedmq
from tests.support.scenarios import written


def test_two_processes_give_the_same_bits(tmp_path: Path) -> None:
    """With different hash seeds: no order of a set comes in."""
    file = str(written(tmp_path, {"aggregator.rounds": "synchronous", "network.loss": 0.2}))

    first, second = (
        fedmq(tmp_path, "simulate", file, "--json", environment={"PYTHONHASHSEED": seed}) for seed in ("1", "2")
    )

    assert first.code == 0, first.err
    assert json.loads(first.out)["updates"] == 200
    assert first.out == second.out


def test_a_wrong_scenario_is_one_message(tmp_path: Path) -> None:
    file = str(written(tmp_path, {"aggregator.strategy": "maen"}))

    done = fedmq(tmp_path, "simulate", file)

    assert_one_message(done, 2, "aggregator.strategy = 'maen'", "did you mean 'mean'")
