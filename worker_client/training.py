"""A task put to work: from a version's parameters to an update's tensors, or to an evaluation."""

from __future__ import annotations

import hashlib
import operator
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from broker.errors import ConfigError, ModelMismatch, TaskError
from broker.messages import DTYPES, Array, Mode, ModelSpec, Parameters, Tensors, Values
from worker_client.adjustment import Adjustment
from worker_client.batches import Examples
from worker_client.config import WorkerConfig, shard_of
from worker_client.context import TrainingContext, TrainingResult
from worker_client.evaluating import Evaluation, checked_metrics, collate_of, evaluate
from worker_client.modelstate import ModelState, as_array
from worker_client.own import OwnParameters
from worker_client.splitting import split, usable
from worker_client.steps import effort as effort_of
from worker_client.task import Shard, Task, blamed

__all__ = ["Evaluation", "Trained", "Trainer", "build_model", "evaluate", "initial_parameters", "load_model"]

#: The ordinal of local steps that only an evaluation sees.
FINE_TUNING = -1

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
    stepping: float = 0.0
    """Of ``seconds``, those in the task's training."""
    model: ModelSpec | None = None
    """What ``tensors`` fit, if that is more than the trainer's ``spec``."""


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
        self._state = ModelState(self._model, config.local_parameters)
        self._own = OwnParameters(config.folder, self._state)
        index, count = shard_of(config.shard, config.name)
        self.shard = Shard(config.name, index, count)
        self._data: Examples | None = None
        self._held_out: Examples | None = None
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
            self._data = usable(data, f"{self.task_name}.data gave nothing usable for {self.shard}")
            if self._config.validation_fraction:
                key = f"{self._task.seed} {self.shard.index} of {self.shard.count}"
                self._data, self._held_out = split(self._data, self._config.validation_fraction, key)
        return len(self._data)

    def load_test_data(self) -> int:
        """Read the held-out data, once; the number of examples. Raises :class:`TaskError`, also if there is none."""
        if self._test_data is None:
            with blamed(self._task, "test_data"):
                data = self._task.test_data()
            if data is None:
                raise TaskError(f"{type(self._task).__name__} has no test_data: an evaluator needs held-out data")
            self._test_data = usable(data, f"{type(self._task).__name__}.test_data gave nothing usable")
        return len(self._test_data)

    def train(
        self,
        parameters: Parameters,
        ordinal: int = 0,
        should_stop: Callable[[], bool] = lambda: False,
        *,
        shift: Tensors | None = None,
        steps: int | None = None,
    ) -> Trained:
        """Train from ``parameters``, whose model is ``spec``; the same inputs give the same tensors.

        ``shift`` is added to the gradients of local steps, by parameter; ``steps`` is how many there are, if the run
        says so.

        Raises:
            TaskError: the task raised, or returned something unusable.
            Abandoned: ``should_stop`` said so between two batches.
        """
        self.load_data()
        assert self._data is not None  # noqa: S101 - load_data has set it
        # In the thread that trains: OpenMP counts its threads for each thread that calls it.
        torch.set_num_threads(self._config.threads)
        started = time.monotonic()
        if self._config.local_parameters and parameters.plan.mode is Mode.GRADIENT:
            raise ConfigError("worker.local_parameters are trained by local steps, and this run asks for gradients")
        self._load(parameters)
        self._model.zero_grad(set_to_none=True)
        settings = self._config if steps is None else self._config.model_copy(update={"local_steps": steps})
        adjustment = self._adjustment(parameters, shift)
        context, seed = self._context(parameters, ordinal, should_stop, adjustment, settings)
        begun = time.monotonic()
        with _seeded(seed, self._device), blamed(self._task, "train"):
            result = self._task.train(self._model, self._data, context)
        stepping = time.monotonic() - begun
        tensors = self._collect(result, parameters)
        self._own.take()
        metrics = checked_metrics(result.metrics)
        examples = _checked_examples(result.examples, self.task_name)
        made, effort = self._steps(result, context)
        self._model.zero_grad(set_to_none=True)
        return Trained(
            tensors=tensors,
            examples=examples,
            metrics=metrics,
            seconds=time.monotonic() - started,
            steps=made,
            effort=effort,
            stepping=stepping,
        )

    def evaluate(self, parameters: Parameters, should_stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """Loss and metrics of ``parameters`` on the held-out data. Raises as :meth:`train`."""
        self.load_test_data()
        assert self._test_data is not None  # noqa: S101 - load_test_data has set it
        torch.set_num_threads(self._config.threads)
        started = time.monotonic()
        self._state.load(parameters.tensors)
        metrics = self._evaluate(self._test_data, should_stop)
        return Evaluation(metrics=metrics, examples=len(self._test_data), seconds=time.monotonic() - started)

    def _load(self, parameters: Parameters) -> None:
        self._state.load(parameters.tensors)
        self._own.load()

    def _evaluate(self, data: Examples, should_stop: Callable[[], bool]) -> dict[str, float]:
        return evaluate(self._task, self._model, data, batch_size=self._config.batch_size, should_stop=should_stop)

    def _context(
        self,
        base: Parameters,
        ordinal: int,
        should_stop: Callable[[], bool],
        adjustment: Adjustment,
        settings: WorkerConfig | None = None,
    ) -> tuple[TrainingContext, int]:
        """What a training from ``base`` is told, and its seed."""
        name = self._config.name
        seed = derived_seed(self._task.seed, name, (base.epoch, base.version, base.plan.asked), ordinal)
        context = TrainingContext(
            mode=base.plan.mode,
            settings=settings or self._config,
            worker=name,
            base_version=base.version,
            ordinal=ordinal,
            device=self._device,
            generator=torch.Generator().manual_seed(seed),
            collate=collate_of(self._task),
            should_stop=should_stop,
            adjustment=adjustment,
        )
        return context, seed

    def _adjustment(self, parameters: Parameters, shift: Tensors | None) -> Adjustment:
        if parameters.plan.mode is Mode.GRADIENT:  # which is taken where the proximal term is 0
            return Adjustment()
        names = set(self._state.parameters)
        trained = {name: p.detach() for name, p in self._model.named_parameters() if name in names}
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

    @property
    def held_out(self) -> int:
        """Examples that this worker evaluates with and does not train on; known once data are loaded."""
        return len(self._held_out) if self._held_out is not None else 0

    def check(self, parameters: Parameters, should_stop: Callable[[], bool] = lambda: False) -> Evaluation:
        """Loss and metrics of ``parameters`` on the examples that this worker holds out.

        Where the plan asks for it, once more as ``personal/…`` after some local steps from there, without what the
        run adds to steps. Raises as :meth:`train`.
        """
        self.load_data()
        assert self._data is not None  # noqa: S101 - load_data has set it
        assert self._held_out is not None  # noqa: S101 - nobody else is asked
        torch.set_num_threads(self._config.threads)
        started = time.monotonic()
        self._load(parameters)
        metrics = self._evaluate(self._held_out, should_stop)
        if steps := parameters.plan.work.personalise_steps:
            settings = self._config.model_copy(update={"local_steps": steps})
            plan = replace(parameters.plan, mode=Mode.DELTA)
            adapted = replace(parameters, plan=plan)
            context, seed = self._context(adapted, FINE_TUNING, should_stop, Adjustment(), settings)
            with _seeded(seed, self._device), blamed(self._task, "train"):
                self._task.train(self._model, self._data, context)
            personal = self._evaluate(self._held_out, should_stop)
            metrics |= {f"personal/{name}": value for name, value in personal.items()}
            self._model.zero_grad(set_to_none=True)
        return Evaluation(
            metrics=checked_metrics(metrics), examples=len(self._held_out), seconds=time.monotonic() - started
        )

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


def initial_parameters(task: Task, local: Sequence[str] = ()) -> tuple[ModelSpec, dict[str, Array]]:
    """The task's freshly built model: what a run starts from if nothing else is given. Raises :class:`TaskError`.

    Without those of its parameters that stay ``local``, with each worker.
    """
    state = ModelState(build_model(task), local)
    return state.spec, state.read()


def build_model(task: Task) -> nn.Module:
    """The task's model, seeded, so that every worker builds the same. Raises :class:`TaskError`."""
    with _building, _seeded(task.seed, torch.device("cpu")), blamed(task, "model"):
        model: Any = task.model()
    if not isinstance(model, nn.Module):
        raise TaskError(f"{type(task).__name__}.model returned a {type(model).__name__}; it must be a torch.nn.Module")
    return model


def load_model(
    task: Task, file: Path | str, *, local_parameters: Sequence[str] = (), own_folder: Path | None = None
) -> nn.Module:
    """The task's model with the parameters of a run: ``load_model(Mine(), "runs/mine/model.safetensors")``.

    The model is built as the run's workers built it, seeded, so that frozen parameters, which do not travel, are
    the same; tied parameters stay tied. ``local_parameters`` of the run are as built, or, with
    ``own_folder``, those of the worker whose folder that is.

    Raises:
        TaskError: the task raised, or the file cannot be read.
        ModelMismatch: the file holds another model.
    """
    model = build_model(task)
    state = ModelState(model, local_parameters)
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
    OwnParameters(own_folder, state).load()
    return model


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


def _checked_examples(examples: Any, who: str) -> int:
    try:
        number = operator.index(examples)
    except TypeError:
        raise TaskError(f"{who}.train returned examples = {examples!r}; it must be a whole number") from None
    if not 1 <= number <= 2**53:
        raise TaskError(f"{who}.train returned examples = {number}; an update needs at least one example")
    return number
