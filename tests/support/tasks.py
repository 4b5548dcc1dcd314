"""Small deterministic tasks for tests that run whole commands, named as ``tests.support.tasks:Line``."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from worker_client.context import TrainingContext, TrainingResult
from worker_client.task import Examples, Shard, Task

__all__ = ["CELLS", "HELD_SECONDS", "SHEET", "SIXTY_MB", "SLENDER", "TEN_MB", "Counting", "Holding", "Line", "Wide"]

#: Length of the vector of :class:`Counting`.
CELLS = 8
#: For how long :class:`Holding` lets no other thread run. With heartbeats of 5 s RabbitMQ gives up before that.
HELD_SECONDS = 18


class Line(Task):
    """A linear model of four inputs, on generated data without noise: a few milliseconds an update."""

    def __init__(self, examples: int = 64) -> None:
        self.examples = examples

    def model(self) -> nn.Module:
        return nn.Linear(4, 1)

    def data(self, shard: Shard) -> Examples:
        random = torch.Generator().manual_seed(shard.index)
        inputs = torch.randn(self.examples, 4, generator=random)
        return TensorDataset(inputs, inputs @ torch.tensor([1.0, -2.0, 3.0, 0.5]) + 1.0)

    def test_data(self) -> Examples | None:
        return self.data(Shard("test", 1000, 1001))


class Counting(Task):
    """Counts its updates: the parameters are ``CELLS`` float64 zeros, and shard i's update adds 1 to cell i.

    With ``aggregator.mode = delta``, ``weighting = uniform``, ``staleness = constant`` and a server learning
    rate of the buffer size, cell i holds exactly how many updates of shard i were applied, as long as the
    buffer size is a power of two (a third is no binary fraction, though rounding hides it).

    Args:
        width: if not 0, each cell is a row of so many float32 that count alike: a model that is cut into chunks, in
            which a chunk of another update would show.
    """

    class Cells(nn.Module):
        """The model: one parameter, ``cells``, and nothing that could be computed with it."""

        def __init__(self, cells: Tensor) -> None:
            super().__init__()
            self.cells = nn.Parameter(cells)

    def __init__(self, width: int = 0) -> None:
        self.width = width

    def model(self) -> nn.Module:
        return self.Cells(self._zeros())

    def _zeros(self) -> Tensor:
        return torch.zeros(CELLS, self.width) if self.width else torch.zeros(CELLS, dtype=torch.float64)

    def data(self, shard: Shard) -> Examples:
        return TensorDataset(torch.tensor([shard.index]))

    def test_data(self) -> Examples | None:
        return TensorDataset(torch.tensor([0]))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        return torch.zeros(())

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """The number of all applied updates."""
        total = float(sum(tensor.sum().item() for tensor in model.parameters()))
        return {"applied": total / max(1, self.width)}

    def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
        (index,) = dataset[0]
        delta = self._zeros()
        delta[int(index)] = 1.0
        return TrainingResult(examples=1, metrics={"loss": 0.0}, tensors={"cells": delta})


#: 512 KiB, so that it takes several chunks of the smallest size.
SHEET = Counting(16_384)


class Holding(Counting):
    """Counts, and lets no other thread of the process run while it trains.

    As a library does that computes in C and keeps Python's interpreter lock all the while.
    """

    def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
        ctypes.PyDLL(None).sleep(HELD_SECONDS)
        return super().train(model, dataset, context)


class Wide(Task):
    """A model of so many layers of 10 MB, and next to nothing that could be computed with it."""

    class Layers(nn.Module):
        """The model: parameters ``layers.0``, ``layers.1``, … of 2.5 million float32 each."""

        def __init__(self, count: int) -> None:
            super().__init__()
            self.layers = nn.ParameterList(torch.zeros(2500, 1000) for _ in range(count))

    def __init__(self, layers: int) -> None:
        self.layers = layers

    def model(self) -> nn.Module:
        return self.Layers(self.layers) if self.layers else nn.Linear(1, 1)

    def data(self, shard: Shard) -> Examples:
        return TensorDataset(torch.ones(1))

    def test_data(self) -> Examples | None:
        return TensorDataset(torch.ones(1))

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Its gradient is 1 everywhere, and it needs no memory but the gradient's."""
        return torch.stack([parameter.sum() for parameter in model.parameters()]).sum()

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        return {}


SLENDER = Wide(0)
TEN_MB = Wide(1)
SIXTY_MB = Wide(6)
