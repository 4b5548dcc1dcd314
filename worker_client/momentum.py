"""Worker momentum: what a worker sends is an exponential average of its own updates.

Karimireddy, He, Jaggi 2021 (arXiv 2012.10333, algorithm 1): with the worker's updates u_t, it sends
m_t = beta m_{t-1} + (1 - beta) u_t, and m_1 = u_1. The average of a good worker varies less than its updates do, so
that robust rules can tell it from an attacker's, which vary with the attack. Theirs are gradients of synchronous
rounds; here they may be deltas, and the average runs over the worker's own updates, whatever their versions.

It is kept on disk, in ``momentum.safetensors`` in the worker's folder, before the update is published, so that an
update counts in it once. One that a crash kept from being published counts, too: an average of what was trained.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import numpy as np

from broker.messages import DTYPES, Array, ModelSpec, ParametersHead, TensorRole, TensorSpec
from worker_client.keeping import is_finite, keep, kept
from worker_client.training import Trained

__all__ = ["Momentum"]

log = logging.getLogger("fedmq.worker")

FILE = "momentum.safetensors"


class Momentum:
    """One worker's average.

    Args:
        folder: where it is kept; None keeps it in memory.
        model: of the run.
    """

    def __init__(self, folder: Path | None, model: ModelSpec) -> None:
        self._file = None if folder is None else folder / FILE
        self._tensors = [tensor for tensor in model.tensors if tensor.role is TensorRole.PARAMETER]
        found = None if self._file is None else kept(self._file, {t.name: t.shape for t in self._tensors})
        self._average: dict[str, Array] = found[0] if found else {}

    def __call__(self, trained: Trained, base: ParametersHead) -> Trained:
        """``trained``, from ``base``, as the average that is to be sent, where the plan asks for it.

        Statistics and counters stay as they are, and so does an update with NaN or infinity, which is rejected and
        does not count.
        """
        beta = base.plan.work.momentum
        if not beta:
            self._average = {}
            return trained
        if not all(is_finite(trained.tensors[tensor.name]) for tensor in self._tensors):
            return trained
        is_first = not self._average
        for tensor in self._tensors:
            new = trained.tensors[tensor.name].astype(_wide(tensor))
            if not is_first:
                new *= 1 - beta
                new += beta * self._average[tensor.name]
            self._average[tensor.name] = new
        if self._file is not None:
            try:
                keep(self._file, self._average, {})
            except OSError as error:
                log.warning("the worker's momentum is kept in memory only: %s", error)
        sent = {t.name: self._average[t.name].astype(DTYPES[t.dtype]) for t in self._tensors}
        return replace(trained, tensors={**trained.tensors, **sent})


def _wide(tensor: TensorSpec) -> np.dtype[np.floating]:
    return np.dtype(np.float64 if tensor.dtype == "float64" else np.float32)
