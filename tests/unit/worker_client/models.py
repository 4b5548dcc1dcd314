"""Small tasks and versions for the worker's tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import TensorDataset

from broker.messages import Array, Mode, ModelSpec, Parameters, ParametersHead, Plan, Rounds, parameters_digest
from worker_client.config import WorkerConfig
from worker_client.task import Examples, Shard, Task
from worker_client.training import Trained, Trainer, initial_parameters

RUN = "test"


class Points(Task):
    """Two classes of points in four dimensions; ``build`` is replaced by tests that need another model."""

    def __init__(self, examples: int = 50, dtype: torch.dtype = torch.float32) -> None:
        self.examples = examples
        self.dtype = dtype

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)).to(self.dtype)

    def data(self, shard: Shard) -> Examples:
        random = torch.Generator().manual_seed(shard.index)
        inputs = torch.randn(self.examples, 4, generator=random)
        return TensorDataset(inputs.to(self.dtype), (inputs.sum(1) > 0).long())

    def test_data(self) -> Examples | None:
        return self.data(Shard("test", 99, 100))


def config(**values: Any) -> WorkerConfig:
    return WorkerConfig.model_validate({"name": "w0", "device": "cpu", **values})


def plan_of(**values: Any) -> Plan:
    return Plan(**{"mode": Mode.DELTA, "rounds": Rounds.BUFFERED, **values})


def head_of(version: int = 0, *, epoch: int = 1, **plan: Any) -> ParametersHead:
    digest = f"{version:064x}"
    return ParametersHead(run=RUN, epoch=epoch, version=version, plan=plan_of(**plan), digest=digest)


def version_of(
    model: ModelSpec, tensors: Mapping[str, Array], version: int = 0, *, epoch: int = 1, **plan: Any
) -> Parameters:
    return Parameters(
        run=RUN,
        epoch=epoch,
        version=version,
        plan=plan_of(**plan),
        digest=parameters_digest(tensors),
        model=model,
        tensors=tensors,
    )


def train_once(task: Task, *, version: int = 0, ordinal: int = 0, mode: Mode = Mode.DELTA, **settings: Any) -> Trained:
    """One training of a new trainer from the task's initial parameters."""
    model, tensors = initial_parameters(task)
    return Trainer(task, config(**settings)).train(version_of(model, tensors, version, mode=mode), ordinal)
