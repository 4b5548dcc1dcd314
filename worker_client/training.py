"""A task put to work: from a version's parameters to an update's tensors, or to an evaluation."""

from __future__ import annotations

import hashlib
import operator
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils.data import default_collate

from broker.errors import ModelMismatch, TaskError
from broker.messages import DTYPES, Array, Mode, ModelSpec, Parameters, Tensors, Values
from worker_client.adjustment import Adjustment
from worker_client.batches import Examples, index_batches
from worker_client.config import WorkerConfig, shard_of
from worker_client.context import TrainingContext, TrainingResult
from worker_client.modelstate import ModelState, as_array
from worker_client.steps import effort as effort_of
from worker_client.steps import loss_of
from worker_client.task import Shard, Task, blamed

__all__ = ["Evaluation", "Trained", "Trainer", "build_model", "evaluate", "initial_parameters", "load_model"]

# torch's global random state belongs to the process: two models built at once would mix theirs up.
_building = threading.Lock()


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """One update's content. ``tensors`` fit the trainer's ``spec`` and belong to the caller."""

    tensors: Tensors
    examples: int
    metrics: Mapping[str, float]
    seconds: float
    encoded: Mapping[str, Values] | None = None
    """Instead of ``tensors``, which are gone then: in the code that the plan asks for."""
    codec: str = ""
    seed: int = 0
    steps: int = 0
    """Local steps; 0 if the training did not say, and for a gradient."""
    effort: float = 0.0
    """What they weigh together (:func:`worker_client.steps.effort`); 0 as above."""
    model: ModelSpec | None = None
    """What ``tensors`` fit, if that is more than the trainer's ``spec``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a version is worth on the held-out data: ``loss`` and the task's own metrics."""

    metrics: Mapping[str, float]
    examples: int
    seconds: float


class Trainer:
    """A task, its model and its shard of the data, as one worker has them.

    Not for several threads at once; torch's global random state is set anew for each training.

    Raises:
        TaskError: the task's ``model`` raised, or gave something that cannot be trained here.
    """

    def __init__(self, task: Task, config: WorkerConfig) -> None:
        self._task = task
        self._config = config
        self._device = pick_device(config.device)
        torch.set_num_threads(config.threads)
        self._model = build_model(task).to(self._device)
        self._state = ModelState(self._model)
        index, count = shard_of(config.shard, config.name)
        self.shard = Shard(config.name, index, count)
        self._data: Examples | None = None
        self._test_data: Examples | None = None

    @property
    def task_name(self) -> str:
        """The task's class, for messages."""
        return type(self._task).__name__

    @property
    def spec(self) -> ModelSpec:
        """The tensors that travel."""
        return self._state.spec

    def load_data(self) -> int:
        """Read the shard, once; the number of its examples. Raises :class:`TaskError`, also if it is empty."""
        if self._data is None:
            with blamed(self._task, "data"):
                data = self._task.data(self.shard)
            self._data = _with_examples(data, f"{type(self._task).__name__}.data gave nothing usable for {self.shard}")
        return len(self._data)

    def load_test_data(self) -> int:
        """Read the held-out data, once; the number of examples. Raises :class:`TaskError`, also if there is none."""
        if self._test_data is None:
            with blamed(self._task, "test_data"):
                data = self._task.test_data()
            if data is None:
                raise TaskError(f"{type(self._task).__name__} has no test_data: an evaluator needs held-out data")
            self._test_data = _with_examples(data, f"{type(self._task).__name__}.test_data gave nothing usable")
        return len(self._test_data)

    def train(
        self,
        parameters: Parameters,
        ordinal: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        shift: Tensors | None = None,
    ) -> Trained:
        """Train from ``parameters``, whose model is ``spec``; the same inputs give the same tensors.

        ``shift`` is added to the gradients of local steps, by parameter.

        Raises:
            TaskError: the task raised, or returned something unusable.
            Abandoned: ``should_stop`` said so between two batches.
        """
        self.load_data()
        assert self._data is not None  # noqa: S101 - load_data has set it
        # In the thread that trains: OpenMP counts its threads for each thread that calls it.
        torch.set_num_threads(self._config.threads)
        started = time.monotonic()
        self._state.load(parameters.tensors)
        self._model.zero_grad(set_to_none=True)
        seed = derived_seed(
            self._task.seed, self._config.name, (parameters.epoch, parameters.version, parameters.plan.asked), ordinal
        )
        context = TrainingContext(
            mode=parameters.plan.mode,
            settings=self._config,
            worker=self._config.name,
            base_version=parameters.version,
            ordinal=ordinal,
            device=self._device,
            generator=torch.Generator().manual_seed(seed),
            collate=_collate_of(self._task),
            should_stop=should_stop,
            adjustment=self._adjustment(parameters, shift),
        )
        with _seeded(seed, self._device), blamed(self._task, "train"):
            result = self._task.train(self._model, self._data, context)
        tensors = self._collect(result, parameters)
        metrics = _checked_metrics(result.metrics)
        examples = _checked_examples(result.examples, self.task_name)
        steps, effort = self._steps(result, context)
        self._model.zero_grad(set_to_none=True)
        return Trained(
            tensors=tensors,
            examples=examples,
            metrics=metrics,
            seconds=time.monotonic() - started,
            steps=steps,
            effort=effort,
        )

    def evaluate(self, parameters: Parameters, should_stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """Loss and metrics of ``parameters`` on the held-out data. Raises as :meth:`train`."""
        self.load_test_data()
        assert self._test_data is not None  # noqa: S101 - load_test_data has set it
        torch.set_num_threads(self._config.threads)
        started = time.monotonic()
        self._state.load(parameters.tensors)
        metrics = evaluate(
            self._task, self._model, self._test_data, batch_size=self._config.batch_size, should_stop=should_stop
        )
        return Evaluation(metrics=metrics, examples=len(self._test_data), seconds=time.monotonic() - started)

    def _adjustment(self, parameters: Parameters, shift: Tensors | None) -> Adjustment:
        if parameters.plan.mode is Mode.GRADIENT:  # which is taken where the proximal term is 0
            return Adjustment()
        trained = {name: p.detach() for name, p in self._model.named_parameters() if p.requires_grad}
        proximal = parameters.plan.work.proximal
        base = {name: p.clone() for name, p in trained.items()} if proximal else {}
        shifts = {name: torch.from_numpy(array).to(trained[name]) for name, array in (shift or {}).items()}
        return Adjustment(proximal, base, shifts)

    def _steps(self, result: TrainingResult, context: TrainingContext) -> tuple[int, float]:
        """Local steps and their effort. Raises :class:`TaskError` if the run's adjustments were left out."""
        if context.mode is Mode.GRADIENT:
            return 0, 0.0
        if context.adjustment.is_needed and not context.adjustment.steps:
            raise TaskError(
                f"this run changes the gradients of local steps, and {self.task_name}.train did not ask for it: call "
                "context.adjust(model) between backward() and the optimiser's step, or leave train as it is"
            )
        steps = context.adjustment.steps if result.steps is None else result.steps
        if result.effort is not None or not steps:
            return steps, result.effort or 0.0
        return steps, effort_of(steps, self._config, context.adjustment.proximal)

    def _collect(self, result: TrainingResult, base: Parameters) -> dict[str, Array]:
        if not isinstance(result, TrainingResult):
            raise TaskError(f"{type(self._task).__name__}.train returned a {type(result).__name__}, no TrainingResult")
        old, names = base.tensors, self._state.parameters
        if result.tensors is not None:
            changes = self._given(result.tensors)
        elif base.plan.mode is Mode.GRADIENT:
            changes = self._state.gradients()
        elif base.plan.mode is Mode.PARAMETERS:
            self._model.zero_grad(set_to_none=True)
            changes = self._state.read(names)
        else:
            # They take as much memory as the delta that is made now.
            self._model.zero_grad(set_to_none=True)
            changes = self._state.change_since(old, names)
        changes |= {name: a for name, a in self._state.buffers_since(old).items() if name not in changes}
        return {tensor.name: changes[tensor.name] for tensor in self.spec.tensors}

    def _given(self, tensors: Mapping[str, Tensor | Array]) -> dict[str, Array]:
        """What a training of the user's own returned, brought to the model's dtypes."""
        who = f"{type(self._task).__name__}.train"
        known = {tensor.name: tensor for tensor in self.spec.tensors}
        missing = [name for name in self._state.parameters if name not in tensors]
        surplus = [name for name in tensors if name not in known]
        if missing or surplus:
            raise TaskError(f"{who} returned other tensors than the model has: missing {missing}, unknown {surplus}")
        result = {}
        for name, value in tensors.items():
            array = as_array(value) if isinstance(value, Tensor) else np.asarray(value)
            if array.shape != known[name].shape:
                raise TaskError(f"{who} returned {name} in shape {array.shape}; the model's is {known[name].shape}")
            result[name] = array.astype(DTYPES[known[name].dtype], copy=True)
        return result


def initial_parameters(task: Task) -> tuple[ModelSpec, dict[str, Array]]:
    """The task's freshly built model: what a run starts from if nothing else is given. Raises :class:`TaskError`."""
    state = ModelState(build_model(task))
    return state.spec, state.read()


def build_model(task: Task) -> nn.Module:
    """The task's model, seeded, so that every worker builds the same. Raises :class:`TaskError`."""
    with _building, _seeded(task.seed, torch.device("cpu")), blamed(task, "model"):
        model: Any = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"{type(task).__name__}.model returned a {type(model).__name__}; it must be a torch.nn.Module")
    return model


def load_model(task: Task, file: Path | str) -> nn.Module:
    """The task's model with the parameters of a run: ``load_model(Mine(), "runs/mine/model.safetensors")``.

    The model is built as the run's workers built it, seeded, so that frozen parameters, which do not travel, are
    the same; tied parameters stay tied.

    Raises:
        TaskError: the task raised, or the file cannot be read.
        ModelMismatch: the file holds another model.
    """
    model = build_model(task)
    state = ModelState(model)
    try:
        with safe_open(file, framework="np") as content:
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        raise TaskError(f"{file} cannot be read: {error}") from None
    expected = {t.name: (t.shape, t.dtype) for t in state.spec.tensors}
    given = {name: (array.shape, array.dtype.name) for name, array in tensors.items()}
    if expected != given:
        names = sorted(name for name in expected.keys() | given.keys() if expected.get(name) != given.get(name))
        raise ModelMismatch(f"{file} holds another model than the task's; they differ in {', '.join(names[:5])}")
    state.load(tensors)
    return model


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
        collate=_collate_of(task),
        should_stop=should_stop,
    )
    sums: dict[str, float] = {}
    was_training = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            for batch, size in context.load(dataset, index_batches(len(dataset), batch_size, None)):
                with blamed(task, "loss"):
                    values = {"loss": loss_of(task, model, batch).item()}
                with blamed(task, "metrics"):
                    values |= task.metrics(model, batch)
                for name, value in values.items():
                    sums[name] = sums.get(name, 0.0) + float(value) * size
    finally:
        for module, training in was_training.items():
            module.training = training
    with blamed(task, "summary"):
        summary = task.summary({name: total / len(dataset) for name, total in sums.items()})
    return _checked_metrics(summary)


def pick_device(name: str) -> torch.device:
    """The device that ``[worker] device`` means. Raises :class:`TaskError` if this machine lacks it."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if (name.startswith("cuda") and not cuda) or (name == "mps" and not mps):
        raise TaskError(f"[worker] device = {name!r}: torch finds no such device here; use 'auto' or 'cpu'")
    return torch.device(name)


def derived_seed(seed: int, worker: str, base: tuple[int, int, int], ordinal: int) -> int:
    """A seed for one training: the same for the same arguments, on every machine."""
    text = f"{seed}:{worker}:{base}:{ordinal}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


@contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Within the block torch's global random state is seeded; afterwards it is what it was."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def _collate_of(task: Task) -> Callable[[list[Any]], Any]:
    # By its own name, so that batches of a TensorDataset can take the short way.
    return default_collate if type(task).collate is Task.collate else task.collate


def _checked_examples(examples: Any, who: str) -> int:
    try:
        number = operator.index(examples)
    except TypeError:
        raise TaskError(f"{who}.train returned examples = {examples!r}; it must be a whole number") from None
    if not 1 <= number <= 2**53:
        raise TaskError(f"{who}.train returned examples = {number}; an update needs at least one example")
    return number


def _with_examples(data: Any, complaint: str) -> Examples:
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TaskError(f"{complaint}: a {type(data).__name__}; it must have a length and indices (map-style)")
    if len(data) == 0:
        raise TaskError(f"{complaint}: no examples; is the shard's index right, and are there enough for all shards?")
    return data  # type: ignore[no-any-return]


def _checked_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Names that the wire format takes. A wrong one is told here, where the user can see it, not by the peer."""
    for name, value in metrics.items():
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_./:-]{1,64}", name):
            raise TaskError(f"metric {name!r}: a name has 1 to 64 letters, digits and _ . / : -")
        if not isinstance(value, int | float):
            raise TaskError(f"metric {name!r} is a {type(value).__name__}; it must be a number (tensor.item())")
    if len(metrics) > 50:
        raise TaskError(f"{len(metrics)} metrics are too many; 50 travel")
    return {name: float(value) for name, value in metrics.items()}
