"""SCAFFOLD on the worker: its own control variate, and how it stays one with what the aggregator has added up.

Karimireddy et al. 2020 (arXiv 1910.06378), option II: with the worker's variate c_i, the mean c of all, K local
steps of size eta from x to y_i along g(y) - c_i + c,

    c_i+ = c_i - c + (x - y_i) / (K eta)        and the update carries c_i+ - c_i.

The aggregator adds up the changes, so that its sum is that of all c_i, if each change counts at both ends or at
neither. An update counts there once by its id, so here it is made durable, whole, before it is first published, and
published again under the same id until the broker has it, over any number of restarts:

1. ``variate-update.fdmq``, the update, is put in place: from now on it counts, for it will be sent.
2. ``variate.safetensors``, c_i after it, with its id. Whoever finds 1 without 2 adds the change once more to what is
   in 2, which knows up to which update it goes.
3. Confirmed, the update becomes ``variate-sent.fdmq``. If the aggregator rejects it, its change is taken back.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from broker.errors import CheckpointNotWritten, ConfigError, TaskError, WireError
from broker.messages import DTYPES, Array, ModelSpec, Parameters, TensorRole, Tensors, Update, UpdateId, whole
from broker.variates import WORKERS, has_variates, name_of, variates_of, with_variates
from broker.wire import decode, encode_parts
from worker_client.config import WorkerConfig
from worker_client.keeping import is_finite, keep, kept, put
from worker_client.training import Trained

__all__ = ["Variates"]

log = logging.getLogger("fedmq.worker")

FILE = "variate.safetensors"
PENDING = "variate-update.fdmq"
SENT = "variate-sent.fdmq"


class Variates:
    """One worker's variate. Without a folder it is kept in memory, and begins anew with each life of the worker.

    Args:
        folder: where it is kept.
        config: of the worker.
        model: of the task.

    Raises :class:`CheckpointNotWritten` if the folder cannot be written.
    """

    def __init__(self, folder: Path | None, config: WorkerConfig, model: ModelSpec) -> None:
        self._folder = folder
        self._config = config
        self._names = [tensor.name for tensor in model.tensors if tensor.role is TensorRole.PARAMETER]
        self._lock = threading.Lock()  # it trains on one thread, and hears of confirms and rejections on another
        self._own: dict[str, Array] = {}
        self._last: tuple[UpdateId, Tensors] | None = None
        self._reverted = ""
        self.pending: Update | None = None
        """An update of a former life that has to be published again."""
        if folder is not None:
            self._read(folder, model)

    def shift(self, base: Parameters) -> dict[str, Array] | None:
        """What is added to the gradients, c - c_i, for each parameter of ``base``; None if its run has no variates.

        Raises :class:`ConfigError` if the local optimiser is another than the formula is for.
        """
        if not has_variates(base.model):
            return None
        if self._config.optimizer != "sgd" or self._config.momentum:
            raise ConfigError(
                "this run goes by control variates (SCAFFOLD), whose steps are plain gradient descent: set "
                "worker.optimizer = 'sgd' and worker.momentum = 0"
            )
        workers = max(1.0, float(whole(base.tensors[WORKERS])))
        with self._lock:
            own = self._own
        result = {}
        for name in self._names:
            mean = whole(base.tensors[name_of(name)]) / workers
            result[name] = mean - own[name_of(name)] if own else mean
        return result

    def complete(self, trained: Trained, base: Parameters, shift: Mapping[str, Array]) -> Trained:
        """``trained``, from ``base`` with ``shift``, and the change of the worker's variate.

        Raises :class:`TaskError` if it is not known how many steps were made.
        """
        if not trained.steps:
            raise TaskError("this run goes by control variates (SCAFFOLD), which take the number of local steps")
        specs = {tensor.name: tensor for tensor in variates_of(base.model)}
        scale = 1.0 / (trained.steps * self._config.learning_rate)
        new = {WORKERS: np.array(1.0)}
        for name in self._names:
            moved = trained.tensors[name].astype(DTYPES[specs[name_of(name)].dtype])
            new[name_of(name)] = -shift[name] - moved * scale
        with self._lock:
            old = self._own or {name: np.zeros_like(array) for name, array in new.items()}
            if not all(map(is_finite, new.values())):
                new = old  # the update is rejected for the same reason
            changes = {name: np.asarray(new[name] - old[name], DTYPES[spec.dtype]) for name, spec in specs.items()}
            self._own = _sum(old, changes)
        return replace(trained, tensors={**trained.tensors, **changes}, model=base.model)

    def record(self, update: Update) -> None:
        """``update`` is about to be published for the first time: from here on its change counts.

        Raises :class:`CheckpointNotWritten` if that cannot be made durable; it must not be published then.
        """
        if not has_variates(update.model):
            return
        with self._lock:
            self._last = update.id, _changes(update)
            if self._folder is None:
                return
            try:
                put(self._folder / PENDING, encode_parts(update))
                self._save(str(update.id))
            except OSError as error:
                raise CheckpointNotWritten(
                    f"{self._folder}: a control variate could not be made durable: {error}"
                ) from None
            self._last = None

    def confirm(self, update: UpdateId) -> None:
        """The broker has ``update``."""
        self.pending = None
        if self._folder is None or not (self._folder / PENDING).exists():
            return
        try:
            (self._folder / PENDING).replace(self._folder / SENT)
        except OSError as error:  # it is sent once more after a restart, and does not count twice
            log.debug("%s stays where it is: %s", update, error)

    def reject(self, update: UpdateId) -> None:
        """The aggregator did not take ``update``: its change is taken back, if it is the last one."""
        with self._lock:
            if not self._own or self._reverted == str(update):
                return
            changes = self._find(update)
            if changes is None:
                log.warning(
                    "the change of the control variate in %s counts nowhere now; the run's mean is off by it", update
                )
                return
            self._own = _sum(self._own, {name: -change for name, change in changes.items()})
            self._reverted = str(update)
            if self._folder is not None:
                try:
                    self._save(self._after)
                except OSError as error:
                    log.warning("a control variate is kept in memory only: %s", error)

    def _find(self, update: UpdateId) -> Tensors | None:
        if self._last is not None and self._last[0] == update:
            return self._last[1]
        for name in (PENDING, SENT):
            found = None if self._folder is None else _update_in(self._folder / name)
            if found is not None and found.id == update:
                return _changes(found)
        return None

    def _save(self, after: str) -> None:
        assert self._folder is not None  # noqa: S101 - only called where there is one
        self._after = after
        keep(self._folder / FILE, self._own, {"after": after, "reverted": self._reverted}, durable=True)

    def _read(self, folder: Path, model: ModelSpec) -> None:
        self._after = ""
        if not any((folder / name).exists() for name in (FILE, PENDING)):
            return
        full = with_variates(model)
        found = kept(folder / FILE, {tensor.name: tensor.shape for tensor in variates_of(full)})
        if found is not None:
            self._own, self._after = found[0], found[1].get("after", "")
            self._reverted = found[1].get("reverted", "")
        update = _update_in(folder / PENDING)
        if update is None or update.model != full:
            return
        self.pending = update
        if self._after != str(update.id):
            zeros = {tensor.name: np.zeros(tensor.shape, DTYPES[tensor.dtype]) for tensor in variates_of(full)}
            self._own = _sum(self._own or zeros, _changes(update))
            try:
                self._save(str(update.id))
            except OSError as error:
                raise CheckpointNotWritten(f"{folder}: a control variate could not be made durable: {error}") from None


def _sum(own: Tensors, changes: Tensors) -> dict[str, Array]:
    return {name: np.asarray(own[name] + change, change.dtype) for name, change in changes.items()}


def _changes(update: Update) -> dict[str, Array]:
    return {tensor.name: whole(update.tensors[tensor.name]) for tensor in variates_of(update.model)}


def _update_in(file: Path) -> Update | None:
    try:
        message = decode(file.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, WireError) as error:
        log.warning("%s cannot be read and is not sent: %s", file, error)
        return None
    return message if isinstance(message, Update) else None
