"""What a model is worth on a data set: the mean loss and the task's own metrics."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import default_collate

from broker.errors import TaskError
from broker.messages import Mode
from broker.progress import bar
from worker_client.batches import Examples, index_batches
from worker_client.config import WorkerConfig
from worker_client.context import TrainingContext
from worker_client.steps import loss_of
from worker_client.task import Task, blamed

__all__ = ["Evaluation", "checked_metrics", "collate_of", "evaluate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a version is worth on the held-out data: ``loss`` and the task's own metrics."""

    metrics: Mapping[str, float]
    examples: int
    seconds: float


def evaluate(
    task: Task,
    model: nn.Module,
    dataset: Examples,
    *,
    batch_size: int = 256,
    should_stop: Callable[[], bool] = lambda: False,
) -> dict[str, float]:
    """The task's summary of its mean loss and metrics over ``dataset``, in eval mode; the model's mode is restored.

    Raises :class:`TaskError` if the task raises, :class:`Abandoned` if ``should_stop`` says so.
    """
    device = next((tensor.device for tensor in model.parameters()), torch.device("cpu"))
    context = TrainingContext(
        mode=Mode.DELTA,
        settings=WorkerConfig(name="evaluation"),
        worker="evaluation",
        base_version=0,
        ordinal=0,
        device=device,
        generator=torch.Generator(),
        collate=collate_of(task),
        should_stop=should_stop,
    )
    sums: dict[str, float] = {}
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        batches = -(-len(dataset) // batch_size)
        with torch.no_grad(), bar("evaluating", total=batches, unit="batches", is_deep=True) as step:
            for batch, size in context.load(dataset, index_batches(len(dataset), batch_size, None)):
                with blamed(task, "loss"):
                    values = {"loss": loss_of(task, model, batch).item()}
                with blamed(task, "metrics"):
                    values |= task.metrics(model, batch)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * size
                step()
    finally:
        for module, training in was_training.items():
            module.training = training
    with blamed(task, "summary"):
        summary = task.summary({name: total / len(dataset) for name, total in sums.items()})
    return checked_metrics(summary)


def collate_of(task: Task) -> Callable[[list[Any]], Any]:
    """How ``task`` makes batches of examples."""
    # By its own name, so that batches of a TensorDataset can take the short way.
    return default_collate if type(task).collate is Task.collate else task.collate


def checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Names that the wire format takes. A wrong one is told here, where the user can see it, not by the peer."""
    for name, value in metrics.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_./:-]{1,64}", name):
            raise TaskError(f"metric {name!r}: a name has 1 to 64 letters, digits and _ . / : -")
        if not isinstance(value, int | float):
            raise TaskError(f"metric {name!r} is a {type(value).__name__}; it must be a number (tensor.item())")
    if len(metrics) > 50:
        raise TaskError(f"{len(metrics)} metrics are too many; 50 travel")
    return {name: float(value) for name, value in metrics.items()}
