"""The two trainings that come with fedmq."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from broker.errors import TaskError
from worker_client.batches import Examples, index_batches
from worker_client.config import WorkerConfig
from worker_client.context import TrainingContext, TrainingResult

if TYPE_CHECKING:  # the task's defaults call this module
    from worker_client.task import Task

__all__ = ["effort", "gradient", "local_steps", "loss_of"]

#: What the wire takes, for local optimisers that blow up.
MOST_EFFORT = 2.0**53


def gradient(task: Task, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
    """Leave the gradient of the mean loss over ``dataset`` in the parameters' ``.grad``.

    It is summed up batch by batch, each weighted by its size, so that ``batch_size`` bounds memory and changes
    nothing but rounding (batch norm, which looks at batches, aside). ``local_steps`` takes as many random
    batches instead of all.
    """
    settings = context.settings
    shuffled = context.generator if settings.local_steps else None
    order = index_batches(len(dataset), settings.batch_size, shuffled)[: settings.local_steps]
    examples = sum(len(indices) for indices in order)
    model.train()
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=context.device)
    for batch, size in context.load(dataset, order):
        part = loss_of(task, model, batch) * (size / examples)
        part.backward()  # type: ignore[no-untyped-call]
        total += part.detach()
    _clip(model, settings.clip_norm)
    return TrainingResult(examples=examples, metrics={"loss": total.item()})


def local_steps(task: Task, model: nn.Module, dataset: Examples, context: TrainingContext) -> TrainingResult:
    """Train ``model`` for ``local_epochs``, or ``local_steps`` if set; its new values are left in the model."""
    settings = context.settings
    model.train()
    optimizer = task.optimizer([p for p in model.parameters() if p.requires_grad], settings)
    total = torch.zeros((), device=context.device)
    seen = 0
    for batch, size in context.load(dataset, _local_order(len(dataset), context)):
        optimizer.zero_grad(set_to_none=True)
        loss = loss_of(task, model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        _clip(model, settings.clip_norm)
        context.adjust(model)
        optimizer.step()
        total += loss.detach() * size
        seen += size
    # The weight of an update is the number of different examples behind it, not of passes over them.
    return TrainingResult(examples=min(seen, len(dataset)), metrics={"loss": total.item() / seen})


def effort(steps: int, settings: WorkerConfig, proximal: float = 0.0) -> float:
    """The sum of the weights with which the gradients of ``steps`` local steps enter the delta, in learning rates.

    It is the norm of the vector a_i of FedNova (Wang et al. 2020, arXiv 2007.07481, section 4), here as the
    response of the optimiser to a single unit gradient, added up over the steps, so that it holds for every
    combination of momentum, proximal term and weight decay, whose pull shortens the traces of earlier steps just
    as the proximal term's does. ``steps`` for plain SGD; for Adam and AdamW, which have no such weights, too.
    """
    pull, momentum, rate = proximal + settings.weight_decay, settings.momentum, settings.learning_rate
    if settings.optimizer != "sgd" or not (pull or momentum):
        return float(steps)
    velocity, moved, total = 1.0, -rate, 0.0
    for _ in range(steps):
        total += abs(moved) / rate
        velocity = momentum * velocity + pull * moved
        moved -= rate * velocity
    return min(MOST_EFFORT, total)  # in this order: of NaN, too, it makes what the wire takes


def _local_order(length: int, context: TrainingContext) -> Iterator[list[int]]:
    settings = context.settings
    steps = 0
    epochs = 0
    while settings.local_steps is not None or epochs < settings.local_epochs:
        for indices in index_batches(length, settings.batch_size, context.generator):
            yield indices
            steps += 1
            if steps == settings.local_steps:
                return
        epochs += 1


def loss_of(task: Task, model: nn.Module, batch: Any) -> Tensor:
    """The task's loss for ``batch``. Raises :class:`TaskError` if it is not a scalar."""
    loss = task.loss(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        shown = f"a tensor of shape {list(loss.shape)}" if isinstance(loss, Tensor) else f"a {type(loss).__name__}"
        raise TaskError(f"{type(task).__name__}.loss returned {shown}; it must be the mean loss, one number")
    return loss.reshape(())


def _clip(model: nn.Module, norm: float | None) -> None:
    if norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), norm)
