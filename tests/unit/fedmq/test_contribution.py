"""``fedmq contribution`` and what it says, on a run's folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.config import AggregatorConfig
from aggregator.contribution import METHODS
from broker.console import parse_flags
from broker.errors import ConfigError, LineageError, ModelMismatch
from broker.settings import load
from fedmq.contribution import calculate
from tests.support.builders import RUN
from tests.support.commands import LINE, fedmq
from tests.support.ondisk import OnDisk
from worker_client.config import WorkerConfig

Value = Callable[..., dict[str, Any]]
START = {"weight": np.zeros((1, 4), np.float32), "bias": np.zeros(1, np.float32)}
#: What ``Line`` learns.
GOAL = {"weight": np.array([[1.0, -2.0, 3.0, 0.5]], np.float32), "bias": np.ones(1, np.float32)}


@pytest.fixture
def run(tmp_path: Path) -> OnDisk:
    """Two versions: one worker goes towards the goal, one stays where it is, one goes away from it."""
    run = OnDisk(tmp_path / "runs" / RUN, START, buffer_size=3)
    for _ in range(2):
        for worker, pace in (("good", 0.3), ("idle", 0.0), ("bad", -0.2)):
            run.publish(worker, {name: pace * array for name, array in GOAL.items()})
            run.settle()
    run.close()
    return run


@pytest.fixture
def value(run: OnDisk) -> Value:
    def calculated(
        method: str, *, task: str = LINE[1], seed: int = 0, since: int = 1, until: int | None = None
    ) -> dict[str, Any]:
        flags = parse_flags([], run=RUN, aggregator__folder=run.folder, worker__task=task)
        read = load({"aggregator": AggregatorConfig, "worker": WorkerConfig}, flags=flags, environment={})
        return calculate(read, method=method, seed=seed, since=since, until=until)

    return calculated


def test_the_gains_are_shown_and_kept(run: OnDisk, tmp_path: Path) -> None:
    told = fedmq(tmp_path, "contribution", "--run", RUN, *LINE, url=None)

    assert told.code == 0, told
    assert "first-order of versions 1 to 2; 2 losses on 64 examples" in told.out
    assert [line.split()[0] for line in told.out.splitlines()[2:]] == ["good", "idle", "bad"]
    assert json.loads((run.folder / "contribution.json").read_text())["method"] == "first-order"


def test_each_method_tells_the_good_from_the_bad(value: Value) -> None:
    for method in METHODS:
        found = value(method, seed=7)
        assert [row["worker"] for row in found["workers"]] == ["good", "idle", "bad"]
        assert gains(found)["bad"] < -0.01 < 0.01 < gains(found)["good"], found
        assert (found["method"], found["seed"], found["until"], found["examples"]) == (method, 7, 2, 64)
        assert {row["updates"] for row in found["workers"]} == {2}
    whole, first, second = value("exact-shapley"), value("exact-shapley", until=1), value("exact-shapley", since=2)
    assert sum(gains(whole).values()) == pytest.approx(whole["loss_before"] - whole["loss_after"])
    assert (list(first["versions"]), list(second["versions"])) == (["1"], ["2"])
    for worker, gain in gains(whole).items():
        assert gain == pytest.approx(gains(first)[worker] + gains(second)[worker])


def gains(found: dict[str, Any]) -> dict[str, float]:
    return {row["worker"]: row["contribution"] for row in found["workers"]}


def test_what_cannot_be_is_refused(value: Value) -> None:
    with pytest.raises(ConfigError, match="no method 'shaply'; there are first-order, leave-one-out"):
        value("shaply")
    with pytest.raises(ModelMismatch, match=r"is not that of run 'test': .*; give the run's --task"):
        value("first-order", task="tests.support.tasks:SLENDER")
    with pytest.raises(ConfigError, match="leave --since away"):
        value("leave-one-out", since=2)
    with pytest.raises(ConfigError, match="--since 3 is after version 2"):
        value("first-order", since=3)
    with pytest.raises(LineageError, match="no updates are kept of the versions up to 0"):
        value("first-order", until=0)
    with pytest.raises(LineageError, match="there is no version 9; the newest is 2"):
        value("first-order", until=9)
