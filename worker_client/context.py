"""What a training is told, and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from broker.errors import FedmqError
from broker.messages import Array, Mode
from worker_client.adjustment import Adjustment
from worker_client.batches import Examples, batch_of, index_batches, to_device
from worker_client.config import WorkerConfig

__all__ = ["Abandoned", "TrainingContext", "TrainingResult"]


class Abandoned(FedmqError):
    """Not an error: how training unwinds, at a batch, once the worker was told to stop."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingResult:
    """What one training gave.

    ``tensors`` is the gradient (mode gradient), the delta (mode delta) or the trained values (mode parameters) by
    parameter name, each in the parameter's shape. If None, it is taken from the model: the parameters' ``.grad``, what
    training changed, or the values.

    ``steps`` is the number of local steps; if None, how often :meth:`TrainingContext.adjust` was called. ``effort``
    is what they weigh together in runs with ``strategy = "fednova"``; if None, what ``[worker]`` makes it
    (:func:`worker_client.steps.effort`).
    """

    examples: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    tensors: Mapping[str, Tensor | Array] | None = None
    steps: int | None = None
    effort: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingContext:
    """What a training is told beside the model and the data."""

    mode: Mode
    """Whether the run wants a gradient at the base version, or a delta or the parameters after local training."""
    settings: WorkerConfig
    worker: str
    base_version: int
    ordinal: int
    """Counts the trainings of this worker from this version, from 0."""
    device: torch.device
    generator: torch.Generator
    """On the CPU; seeded by task, worker, base version and ordinal, as is torch's global one."""
    collate: Callable[[list[Any]], Any]
    should_stop: Callable[[], bool] = lambda: False
    adjustment: Adjustment = field(default_factory=Adjustment)

    def adjust(self, model: nn.Module) -> None:
        """Change the gradients in ``model`` as the run asks (FedProx and the like), and count the step.

        Between ``backward`` and the optimiser's step; a training of your own must call it where the run asks for
        any such thing.
        """
        self.adjustment(model)

    def batches(self, dataset: Examples, *, shuffle: bool = True) -> Iterator[tuple[Any, int]]:
        """One pass over ``dataset``: pairs of a batch, on the device, and its number of examples.

        Raises :class:`Abandoned` between two batches once the worker was told to stop.
        """
        order = index_batches(len(dataset), self.settings.batch_size, self.generator if shuffle else None)
        return self.load(dataset, order)

    def load(self, dataset: Examples, order: Iterable[list[int]]) -> Iterator[tuple[Any, int]]:
        """As :meth:`batches`, for given lists of indices."""
        for indices in order:
            self.check()
            yield to_device(batch_of(dataset, indices, self.collate), self.device), len(indices)

    def check(self) -> None:
        """Raise :class:`Abandoned` if the worker was told to stop."""
        if self.should_stop():
            raise Abandoned("training was abandoned, because the worker leaves")
