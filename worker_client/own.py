"""Parameters that stay with their worker, from one training to the next and from one life to the next.

``[worker] local_parameters`` names them: a head for each worker on a body that all share (Arivazhagan et al. 2019,
arXiv 1912.00818, FedPer; Collins et al. 2021, arXiv 2102.07078, train the two one after the other, which is not done
here). They train along and are never sent. They are in ``own.safetensors`` in the worker's folder.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np

from broker.messages import DTYPES, Array
from worker_client.keeping import keep, kept
from worker_client.modelstate import ModelState

__all__ = ["FILE", "OwnParameters"]

log = logging.getLogger("fedmq.worker")

FILE = "own.safetensors"


class OwnParameters:
    """The values that one worker has reached.

    Args:
        folder: where they are kept; None keeps them in memory.
        state: of a model as it was built, whose values they begin with.
    """

    def __init__(self, folder: Path | None, state: ModelState) -> None:
        self._file = None if folder is None else folder / FILE
        self._state = state
        self._values: dict[str, Array] = state.read_local()
        if self._values and self._file is not None:
            found = kept(self._file, {name: array.shape for name, array in self._values.items()})
            if found is not None:
                self._values = {name: array.astype(self._values[name].dtype) for name, array in found[0].items()}

    def load(self) -> None:
        """Put them into the model, whatever it holds."""
        self._state.load_local(self._values)

    def take(self) -> None:
        """The model's are the worker's from now on."""
        if not self._values:
            return
        self._values = self._state.read_local()
        if self._file is None:
            return
        half = DTYPES["bfloat16"]
        plain = {n: a.astype(np.float32) if a.dtype == half else a for n, a in self._values.items()}
        try:
            keep(self._file, plain, {})
        except OSError as error:
            log.warning("this worker's own parameters are kept in memory only: %s", error)
