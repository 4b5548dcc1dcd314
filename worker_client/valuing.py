"""What a model is worth on held-out data: its loss, and the loss's gradient. For the valuation of workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from broker.errors import TaskError
from broker.messages import Array, Values
from worker_client.batches import batch_of, index_batches, to_device
from worker_client.config import WorkerConfig
from worker_client.modelstate import ModelState
from worker_client.steps import loss_of
from worker_client.task import Task, blamed
from worker_client.training import build_model, pick_device

__all__ = ["HeldOut"]


class HeldOut:
    """A task's model and its held-out data, as an evaluator has them.

    Raises:
        TaskError: the task's ``model`` or ``test_data`` raised, or gave nothing usable.
        ConfigError: some of the model stays with the workers.
    """

    def __init__(self, task: Task, config: WorkerConfig) -> None:
        config.require_whole_model("who values updates")
        self._task = task
        self._batch_size = config.batch_size
        self._device = pick_device(config.device)
        torch.set_num_threads(config.threads)
        self._model = build_model(task).to(self._device)
        self._state = ModelState(self._model)
        with blamed(task, "test_data"):
            data = task.test_data()
        if data is None or not len(data):
            raise TaskError(f"{type(task).__name__} has no test_data: held-out data say what an update is worth")
        self._data = data

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self._data)

    def loss(self, tensors: Mapping[str, Values]) -> float:
        """The mean loss of the model with these parameters. Raises :class:`TaskError`."""
        with torch.no_grad():
            return sum(part.item() for part in self._parts(tensors))

    def gradient(self, tensors: Mapping[str, Values]) -> dict[str, Array]:
        """Of the mean loss, for each parameter that travels. Raises :class:`TaskError`."""
        self._model.zero_grad(set_to_none=True)
        for part in self._parts(tensors):
            part.backward()  # type: ignore[no-untyped-call]
        return self._state.gradients()

    def _parts(self, tensors: Mapping[str, Values]) -> Iterator[Tensor]:
        """What each batch has in the mean loss. In eval mode: dropout would make every answer another one."""
        self._state.load(tensors)
        self._model.eval()
        for indices in index_batches(len(self._data), self._batch_size, None):
            batch = to_device(batch_of(self._data, indices, self._task.collate), self._device)
            with blamed(self._task, "loss"):
                yield loss_of(self._task, self._model, batch) * (len(indices) / len(self._data))
