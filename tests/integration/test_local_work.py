"""What runs ask of local work, from the configuration to the model: over the in-process broker, with torch."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from broker.variates import WORKERS, name_of
from tests.support.tasks import Line
from tests.support.together import federate
from worker_client.task import Examples, Shard, Task

THREE = {f"w{index}": {"shard": f"{index}/3"} for index in range(3)}


class Leaning(Task):
    """Linear regression where each worker's data have slopes and inputs of their own."""

    def model(self) -> nn.Module:
        return nn.Linear(2, 1, bias=False, dtype=torch.float64)

    def data(self, shard: Shard) -> Examples:
        random = torch.Generator().manual_seed(shard.index)
        inputs = torch.randn(40, 2, generator=random, dtype=torch.float64) * torch.tensor([1.0 + shard.index, 1.0])
        slopes = torch.tensor([[3.0, -2.0], [-1.0, 4.0], [0.5, 1.0]], dtype=torch.float64)[shard.index]
        return TensorDataset(inputs, inputs @ slopes)

    def optimum(self) -> Any:
        """Of the mean of the workers' losses."""
        parts = [self.data(Shard("w", index, 3)).tensors for index in range(3)]  # type: ignore[attr-defined]
        inputs, targets = (torch.cat([part[i] for part in parts]) for i in range(2))
        return torch.linalg.lstsq(inputs, targets[:, None]).solution.numpy().ravel()

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        inputs, targets = batch
        loss: Tensor = (model(inputs).ravel() - targets).square().mean()
        return loss


@pytest.mark.parametrize("is_scaffold", [False, True])
def test_scaffold_reaches_the_optimum_of_all_and_fedavg_does_not(tmp_path: Path, is_scaffold: bool) -> None:
    ended = federate(
        tmp_path,
        Leaning(),
        {
            "rounds": "synchronous",
            "minimum_updates": 3,
            "stop_after_rounds": 25,
            "control_variates": is_scaffold,
        },
        THREE,
        batch_size=40,
        local_steps=8,
        learning_rate=0.03,
    )

    weight = ended.snapshot.parameters["weight"].ravel()
    distance = float(np.linalg.norm(weight - Leaning().optimum()))
    if not is_scaffold:
        assert distance > 0.05
        return
    assert distance < 0.01
    assert ended.snapshot.parameters[WORKERS] == 3.0
    assert np.any(ended.snapshot.parameters[name_of("weight")])
    assert {entry["steps"] for line in ended.lines("version") for entry in line["updates"]} == {8}


# ------------------------------------------------------------------------------------------ federated evaluation


@pytest.mark.parametrize("rounds", ["synchronous", "buffered"])
def test_workers_evaluate_on_data_of_their_own(tmp_path: Path, rounds: str) -> None:
    # Given rounds that no worker can be too late for
    workers: dict[str, Any] = dict(THREE)
    settings: dict[str, Any] = {"buffer_size": 3, "updates_per_version": 1}
    if rounds == "synchronous":
        workers["w3"] = {"shard": "3/4", "validation_fraction": 0.0}
        settings = {"minimum_updates": 4}

    ended = federate(
        tmp_path,
        Line(),
        {"rounds": rounds, "stop_after_rounds": 9, "evaluate_every": 3, "personalise_steps": 2, **settings},
        workers,
        validation_fraction=0.25,
        learning_rate=0.05,
    )

    lines = ended.lines("federated")
    assert [line["version"] for line in lines] == [0, 3, 6, 9]
    first, last = lines[0], lines[-1]
    # w3 holds nothing out; of each other's 64 examples, 16 are.
    assert (last["versions"], last["workers"], last["examples"]) == ([9, 9], 3, 48)
    for line in lines:
        for name in ("loss", "personal/loss"):
            spread = line["metrics"][name]
            assert spread["min"] <= spread["median"] <= spread["max"]
            assert spread["min"] <= spread["mean"] <= spread["max"]
    assert last["metrics"]["loss"]["mean"] < first["metrics"]["loss"]["mean"]
    assert first["metrics"]["personal/loss"]["mean"] < first["metrics"]["loss"]["mean"]
    assert ended.outcome.federated is not None
    assert ended.outcome.federated.version == 9
    assert ended.outcome.evaluated == -1, "no evaluator took part"


# ------------------------------------------------------------------------------------------------ heads of their own


class Opposed(Task):
    """The workers agree on what matters in the inputs, and not on what it means: w1 says the opposite of w0."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1))

    def data(self, shard: Shard) -> Examples:
        random = torch.Generator().manual_seed(shard.index)
        inputs = torch.randn(80, 3, generator=random)
        return TensorDataset(inputs, inputs @ torch.tensor([1.0, -2.0, 0.5]) * (-1) ** shard.index)


def test_heads_stay_with_their_workers_and_come_back(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"rounds": "synchronous", "minimum_updates": 2, "evaluate_every": 1}
    two = {"w0": {"shard": "0/2"}, "w1": {"shard": "1/2"}}
    common: dict[str, Any] = {"validation_fraction": 0.25, "learning_rate": 0.05, "local_epochs": 4}
    together = federate(tmp_path / "shared", Opposed(), {**settings, "stop_after_rounds": 10}, two, **common)
    assert together.outcome.federated is not None
    assert together.outcome.federated.metrics["loss"].mean > 1.0, "one head for both can say nothing"

    apart = federate(
        tmp_path / "own", Opposed(), {**settings, "stop_after_rounds": 10}, two, **common, local_parameters=["1.*"]
    )

    assert set(apart.snapshot.parameters) == {"0.weight", "0.bias"}
    assert apart.outcome.federated is not None
    reached = apart.outcome.federated.metrics["loss"].maximum
    assert reached < 0.1
    # When all is started again for one more round
    again = federate(
        tmp_path / "own", Opposed(), {**settings, "stop_after_rounds": 11}, two, **common, local_parameters=["1.*"]
    )
    first = [line for line in again.lines("federated") if line["version"] == 10][-1]
    assert first["metrics"]["loss"]["max"] == pytest.approx(reached)


# --------------------------------------------------------------------------------------------------- speed-aware


class Unequal(Line):
    """Worker 0 needs at least 40 ms for a step; worker 1 next to nothing."""

    def data(self, shard: Shard) -> Examples:
        inputs, targets = super().data(shard).tensors  # type: ignore[attr-defined]
        return TensorDataset(inputs, targets, torch.full((len(inputs),), 0.04 * (shard.index == 0)))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        *pair, pause = batch
        time.sleep(float(pause[0]))
        return super().loss(model, pair)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        return {}


def test_workers_make_as_many_steps_as_fit_into_the_rhythm(tmp_path: Path) -> None:
    ended = federate(
        tmp_path,
        Unequal(),
        {
            "rounds": "synchronous",
            "minimum_updates": 2,
            "stop_after_rounds": 12,  # a first step that took long, as first steps do, is forgotten by then
            "strategy": "fednova",
            "update_seconds": 0.1,
            "local_steps_max": 400,
        },
        {"w0": {"shard": "0/2"}, "w1": {"shard": "1/2"}},
        batch_size=4,
        learning_rate=0.01,
    )

    steps: dict[str, list[int]] = {"w0": [], "w1": []}
    for line in ended.lines("version"):
        for entry in line["updates"]:
            steps[entry["worker"]].append(entry["steps"])
    assert steps["w0"][0] == steps["w1"][0] == 1
    assert all(1 <= made <= 2 for made in steps["w0"]), steps
    assert max(steps["w1"]) > 2, steps
