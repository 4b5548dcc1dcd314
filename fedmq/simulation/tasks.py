"""The true objective: a production task, trained by the worker's own trainer, one for each virtual worker."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import ConfigError
from broker.messages import Parameters, Plan, Tensors
from fedmq.simulation.attacks import bad_workers, flip_labels, flips_labels
from fedmq.simulation.objectives import Work
from fedmq.simulation.partitions import cut
from fedmq.simulation.scenario import Scenario
from worker_client.config import WorkerConfig
from worker_client.loading import load_task
from worker_client.momentum import Momentum
from worker_client.splitting import usable
from worker_client.task import Shard, Task, blamed
from worker_client.training import Trainer, initial_parameters

__all__ = ["TaskObjective"]

Array = NDArray[Any]

#: Integers beyond are no classes, but numbers of users, seconds or the like.
MOST_CLASSES = 10_000


class TaskObjective:
    """The task of ``[worker]``. Each worker has a model and its part of the data, made when it first trains.

    Raises:
        TaskError: the task cannot be imported, or raised.
        ConfigError: its data cannot be cut as ``[data]`` says.
    """

    def __init__(self, scenario: Scenario, names: list[str], *, shards: int) -> None:
        self._names = names
        self._shards = shards
        self._config = scenario.worker
        self._task = load_task(scenario.worker.task)
        self._bad = bad_workers(scenario.attack.share, len(names))
        self._flips = flips_labels(scenario.attack.kind) if self._bad else False
        self._classes = 0
        self.model, self._initial = initial_parameters(self._task)
        self._all: Any = None
        self._labels: Array | None = None
        self._parts: list[NDArray[np.int64]] | None = None
        if scenario.data.partition != "task" or self._flips:
            self._all = self._loaded(Shard("all", 0, 1))
            self._labels = labels_of(self._all)
        if scenario.data.partition != "task":
            self._parts = cut(
                scenario.data,
                len(self._all),
                shards,
                labels=self._labels,
                groups=groups_of(self._task, self._all),
                seed=scenario.run.seed,
            )
        if self._flips:
            if self._labels is None:
                raise ConfigError("attack.kind = 'label-flip' needs classes, and this task's examples have none")
            self._classes = int(self._labels.max()) + 1
        self._trainers: dict[int, Trainer] = {}
        self._averages: dict[int, Momentum] = {}
        self._evaluator = Trainer(self._task, self._settings("evaluation", "0/1"))
        self.metric = "accuracy" if "accuracy" in self.score(self._initial) else "loss"

    def initial(self) -> dict[str, Array]:
        """The task's freshly built model."""
        return self._initial

    def train(self, worker: int, base: Parameters, ordinal: int) -> Work:
        """As a real worker does. Raises :class:`TaskError`."""
        trained = self._trainer(worker).train(base, ordinal)
        if worker not in self._averages:
            self._averages[worker] = Momentum(None, self.model)
        trained = self._averages[worker](trained, base)
        return Work(
            trained.tensors,
            trained.examples,
            trained.metrics,
            steps=trained.steps,
            effort=trained.effort,
            model=trained.model,
        )

    def score(self, tensors: Tensors) -> dict[str, float]:
        """As an evaluator does. Raises :class:`TaskError`, also if the task has no held-out data."""
        version = Parameters(
            run="simulation",
            epoch=0,
            version=0,
            plan=Plan(),
            digest="0" * 64,
            model=self.model,
            tensors=tensors,
        )
        return dict(self._evaluator.evaluate(version).metrics)

    def counts(self) -> Array | None:
        """Examples by worker and class; by worker alone, as one column, if there are no classes."""
        rows = []
        for worker in range(len(self._names)):
            labels = labels_of(self._data(worker))
            rows.append(np.bincount(labels) if labels is not None else np.array([len(self._data(worker))]))
        table = np.zeros((len(rows), max(map(len, rows))), np.int64)
        for worker, row in enumerate(rows):
            table[worker, : len(row)] = row
        return table

    def _settings(self, name: str, shard: str) -> WorkerConfig:
        given = self._config.model_dump(exclude={"name", "shard"})
        return WorkerConfig(name=name, shard=shard, **given)

    def _trainer(self, worker: int) -> Trainer:
        trainer = self._trainers.get(worker)
        if trainer is None:
            settings = self._settings(self._names[worker], f"{worker}/{self._shards}")
            own = _WithData(self._task, self._data(worker)).task() if self._has_own(worker) else self._task
            trainer = self._trainers[worker] = Trainer(own, settings)
        return trainer

    def _has_own(self, worker: int) -> bool:
        return self._parts is not None or (self._flips and worker in self._bad)

    def _loaded(self, shard: Shard) -> Any:
        with blamed(self._task, "data"):
            data = self._task.data(shard)
        return usable(data, f"{type(self._task).__name__}.data gave, for shard {shard.index} of {shard.count}")

    def _data(self, worker: int) -> Any:
        if self._parts is None:
            data = self._loaded(Shard(self._names[worker], worker, self._shards))
        else:
            data = subset(self._all, self._parts[worker])
        return flipped(data, self._classes) if self._flips and worker in self._bad else data


@dataclass(frozen=True, slots=True)
class _WithData:
    """A task with other data."""

    origin: Task
    dataset: Any

    def task(self) -> Task:
        """The same task in everything else, of the same class."""
        own, dataset = copy.copy(self.origin), self.dataset
        own.data = lambda _shard: dataset  # type: ignore[method-assign,assignment]
        return own


class _Chosen:
    """Some examples of a data set, changed on their way out."""

    def __init__(self, dataset: Any, indices: Array, classes: int | None = None) -> None:
        self._dataset, self._indices, self._classes = dataset, indices, classes

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Any:
        example = self._dataset[int(self._indices[index])]
        if self._classes is None:
            return example
        inputs, label = example
        return inputs, self._classes - 1 - label


def subset(dataset: Any, indices: Array) -> Any:
    """The examples of ``dataset`` at ``indices``; of a TensorDataset another one, which makes batches faster."""
    if hasattr(dataset, "tensors"):
        return type(dataset)(*(tensor[indices] for tensor in dataset.tensors))
    return _Chosen(dataset, indices)


def flipped(dataset: Any, classes: int) -> Any:
    """``dataset`` with every label y as ``classes`` - 1 - y."""
    if hasattr(dataset, "tensors"):
        inputs, labels = dataset.tensors
        return type(dataset)(inputs, labels.new_tensor(flip_labels(labels.numpy(), classes)))
    return _Chosen(dataset, np.arange(len(dataset)), classes)


def labels_of(dataset: Any) -> Array | None:
    """The classes of pairs of input and class, as int64, from 0 on; None if they are none."""
    if hasattr(dataset, "tensors"):
        last = dataset.tensors[-1].numpy() if len(dataset.tensors) == 2 else None
    else:
        try:
            last = np.array([label for _, label in (dataset[i] for i in range(len(dataset)))])
        except (TypeError, ValueError):
            return None
    if last is None or last.ndim != 1 or last.dtype.kind not in "iu":
        return None
    return last.astype(np.int64) if last.size and last.min() >= 0 and last.max() < MOST_CLASSES else None


def groups_of(task: Task, dataset: Any) -> Array | None:
    """What the task's own ``groups(dataset)`` names, if it has that."""
    name_groups = getattr(task, "groups", None)
    if name_groups is None:
        return None
    with blamed(task, "groups"):
        groups = np.asarray(name_groups(dataset))
    if groups.shape != (len(dataset),):
        raise ConfigError(f"{type(task).__name__}.groups gave {groups.shape}; one for each of {len(dataset)} is wanted")
    return groups
