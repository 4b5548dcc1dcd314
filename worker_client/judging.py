"""How good a model is on the task's held-out data: its loss, and the gradient of that."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from broker.errors import TaskError
from broker.messages import Array, Mode, ModelSpec, Tensors
from worker_client.batches import index_batches
from worker_client.config import WorkerConfig
from worker_client.context import TrainingContext
from worker_client.evaluating import collate_of
from worker_client.modelstate import ModelState
from worker_client.splitting import usable
from worker_client.steps import loss_of
from worker_client.task import Task, blamed
from worker_client.training import build_model, pick_device

__all__ = ["HeldOut"]


class HeldOut:
    """A task, its model and its held-out data. In eval mode: batch norm takes the statistics that travel.

    Raises:
        TaskError: the task raised, or has no held-out data.
        ConfigError: some of the model stays with the workers.
    """

    def __init__(self, task: Task, config: WorkerConfig) -> None:
        config.require_whole_model("who values updates")
        self._task = task
        device = pick_device(config.device)
        torch.set_num_threads(config.threads)
        self._model = build_model(task).to(device).eval()
        self._state = ModelState(self._model)
        with blamed(task, "test_data"):
            data = task.test_data()
        name = type(task).__name__
        if data is None:
            raise TaskError(f"{name} has no test_data: without held-out data nobody knows what an update was worth")
        self._data = usable(data, f"{name}.test_data gave nothing usable")
        self._order = index_batches(len(self._data), config.batch_size, None)
        self._context = TrainingContext(
            mode=Mode.GRADIENT,
            settings=config,
            worker=config.name,
            base_version=0,
            ordinal=0,
            device=device,
            generator=torch.Generator(),
            collate=collate_of(task),
        )

    @property
    def spec(self) -> ModelSpec:
        """The tensors that :meth:`loss` and :meth:`gradient` take."""
        return self._state.spec

    @property
    def examples(self) -> int:
        """How many were held out."""
        return len(self._data)

    def loss(self, parameters: Tensors) -> float:
        """The mean loss over all held-out examples. Raises :class:`TaskError`."""
        self._state.load(parameters)
        with torch.no_grad():
            return sum(part.item() for part in self._parts())

    def gradient(self, parameters: Tensors) -> dict[str, Array]:
        """The gradient of :meth:`loss`, of the tensors that train, in their dtypes. Raises :class:`TaskError`."""
        self._state.load(parameters)
        with self._training():
            for part in self._parts():
                if part.requires_grad:
                    part.backward()  # type: ignore[no-untyped-call]
            return {name: np.array(array) for name, array in self._state.gradients().items()}

    @contextmanager
    def _training(self) -> Iterator[None]:
        self._model.zero_grad(set_to_none=True)
        try:
            yield
        finally:
            self._model.zero_grad(set_to_none=True)

    def _parts(self) -> Iterator[Tensor]:
        """What each batch has of the mean."""
        for batch, size in self._context.load(self._data, self._order):
            with blamed(self._task, "loss"):
                part = loss_of(self._task, self._model, batch)
            yield part * (size / len(self._data))
