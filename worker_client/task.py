"""What a user writes: a model, its data, and (only where the defaults do not do) how it trains.

    class Mine(Task):
        def model(self): return nn.Linear(8, 2)
        def data(self, shard): return TensorDataset(...)

A task is named like uvicorn's applications: ``package.module:attribute``.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn, optim
from torch.nn import functional
from torch.utils.data import default_collate

from broker.errors import FedmqError, TaskError
from broker.messages import Mode
from worker_client import steps
from worker_client.batches import Examples
from worker_client.config import WorkerConfig
from worker_client.context import TrainingContext, TrainingResult

__all__ = ["Examples", "Shard", "Task", "TrainingContext", "TrainingResult", "blamed", "place_of"]


@dataclass(frozen=True, slots=True)
class Shard:
    """Which part of the data is a worker's: part ``index`` (from 0) of ``count``."""

    worker: str
    index: int
    count: int

    def __str__(self) -> str:
        return f"shard {self.index}/{self.count} of worker {self.worker!r}"


class Task:
    """What is learned. Subclass it; only ``model`` and ``data`` have no default."""

    seed: int = 0
    """All workers of a run build the same model from it, and derive their shuffling."""

    def model(self) -> nn.Module:
        """A new model. Called once, with torch's random numbers seeded by ``seed``."""
        raise NotImplementedError(f"{type(self).__name__} must define model()")

    def data(self, shard: Shard) -> Examples:
        """The training data of one shard: a map-style ``Dataset`` or a sequence of examples."""
        raise NotImplementedError(f"{type(self).__name__} must define data(shard)")

    def test_data(self) -> Examples | None:
        """Held-out data for evaluators; None if there is none."""
        return None

    def collate(self, examples: list[Any]) -> Any:
        """Examples to a batch, as torch's ``collate_fn``."""
        return default_collate(examples)

    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Mean loss over ``batch``, a scalar that ``backward`` can be called on.

        By default a batch is (inputs, targets): cross entropy for integer targets, with the classes in
        dimension 1 of the model's output; mean squared error for float targets of the output's size.
        """
        inputs, targets = batch
        outputs = model(inputs)
        if targets.is_floating_point():
            return functional.mse_loss(outputs, targets.reshape(outputs.shape).to(outputs.dtype))
        return functional.cross_entropy(outputs, targets.long())

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Means over ``batch`` of whatever is worth knowing; by default accuracy, for integer targets."""
        inputs, targets = batch
        if targets.is_floating_point():
            return {}
        return {"accuracy": (model(inputs).argmax(1) == targets).float().mean().item()}

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """What an evaluation tells, from the means of ``loss`` and metrics over all held-out data; as they are.

        For what is no mean itself: perplexity is e to the mean loss.
        """
        return dict(means)

    def optimizer(self, parameters: list[nn.Parameter], settings: WorkerConfig) -> optim.Optimizer:
        """The local optimiser; by default what ``[worker]`` says."""
        rate, decay = settings.learning_rate, settings.weight_decay
        if settings.optimizer == "adam":
            return optim.Adam(parameters, lr=rate, weight_decay=decay)
        if settings.optimizer == "adamw":
            return optim.AdamW(parameters, lr=rate, weight_decay=decay)
        return optim.SGD(parameters, lr=rate, momentum=settings.momentum, weight_decay=decay)

    def train(self, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
        """Train ``model``, which holds the base version, on ``dataset``.

        Replace it for a training of your own. It leaves the gradient in the parameters' ``.grad`` or the
        trained values in the model, as ``context.mode`` says, or returns the tensors itself.
        """
        if context.mode is Mode.GRADIENT:
            return steps.gradient(self, model, dataset, context)
        return steps.local_steps(self, model, dataset, context)


@contextmanager
def blamed(task: Task, method: str) -> Iterator[None]:
    """Turn what the user's ``method`` raises into a :class:`TaskError` that says where, and keeps the cause."""
    try:
        yield
    except FedmqError:
        raise
    except Exception as error:
        name = type(task).__name__
        raise TaskError(f"{name}.{method} raised {type(error).__name__}: {error} ({place_of(error, task)})") from error


def place_of(error: BaseException, task: Task | None = None) -> str:
    """``file:line`` where ``error`` arose: the innermost line of the task's own file, if it is among them."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    if not frames:
        return "no traceback"
    files = set() if task is None else {_file_of(kind) for kind in type(task).__mro__[:-1]} - {__file__}
    own = [frame for frame in frames if frame.filename in files]
    frame = (own or frames)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _file_of(kind: type) -> str | None:
    return getattr(sys.modules.get(kind.__module__), "__file__", None)
