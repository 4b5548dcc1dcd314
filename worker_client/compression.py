"""Updates in the lossy code that the plan asks for, and what the code leaves out.

A codec with error feedback (``topk``) sends a part of each update. The rest, the residual, is kept and added to the
next update, so that nothing is lost for ever, only late (Seide et al. 2014; Stich et al. 2018, arXiv 1809.07599,
algorithm 1 without memory of the step size). It is kept on disk, in ``residual.safetensors`` in the worker's folder,
and dropped when it is from too many versions ago: what it wanted to change has long been changed by others.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import replace
from math import prod
from pathlib import Path

import numpy as np

from broker.codecs import applies, codec_of
from broker.messages import Array, ModelSpec, ParametersHead, Values, pieces
from broker.wire import compressed
from worker_client.keeping import is_finite, keep, kept
from worker_client.training import Trained

__all__ = ["Compressor"]

log = logging.getLogger("fedmq.worker")

#: A residual from so many versions ago is dropped.
MOST_VERSIONS = 50
FILE = "residual.safetensors"


class Compressor:
    """One worker's updates in the code of the plan.

    Args:
        folder: where the residual is kept; None keeps it in memory.
        who: the worker's name and incarnation, from which random signs and the like are drawn.
        model: of the run.
    """

    def __init__(self, folder: Path | None, who: str, model: ModelSpec) -> None:
        self._folder = folder
        self._who = who
        self._model = model
        self._residual: dict[str, Array] = {}
        self._version = -1
        if folder is not None:
            self._read(folder / FILE)

    def __call__(self, trained: Trained, base: ParametersHead, ordinal: int) -> Trained:
        """``trained``, the training number ``ordinal`` from ``base``, as it is to be sent.

        As it is if the plan asks for no code, or if it holds NaN or infinity, which no code has a word for.

        Raises :class:`ConfigError` for a codec that this release does not know.
        """
        if not base.plan.codec or not all(is_finite(values) for values in trained.tensors.values()):
            return trained
        codec = codec_of(base.plan.codec)
        text = f"{self._who} {base.epoch} {base.version} {base.plan.asked} {ordinal}"
        seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
        tensors: dict[str, Values] = dict(trained.tensors)
        if codec.feedback:
            self._add_residual(tensors, base.version)
        encoded = compressed(trained.model or self._model, tensors, codec.name, seed)
        if codec.feedback:
            self._keep(tensors, encoded, base.version)
        return replace(trained, tensors={}, encoded=encoded, codec=codec.name, seed=seed)

    def _add_residual(self, tensors: dict[str, Values], version: int) -> None:
        if not 0 <= version - self._version <= MOST_VERSIONS:
            self._residual = {}
        for name, rest in self._residual.items():
            values = next(pieces(tensors[name]))
            tensors[name] = (values.astype(np.float32) + rest).reshape(tensors[name].shape)

    def _keep(self, tensors: dict[str, Values], encoded: dict[str, Values], version: int) -> None:
        self._residual, self._version = {}, version
        for spec in self._model.tensors:
            if not applies(spec):
                continue
            rest = np.array(next(pieces(tensors[spec.name])), np.float32)
            start = 0
            for piece in pieces(encoded[spec.name]):
                rest[start : start + piece.size] -= piece
                start += piece.size
            self._residual[spec.name] = rest
        if self._folder is not None:
            self._write(self._folder / FILE)

    def _write(self, file: Path) -> None:
        try:
            keep(file, self._residual, {"version": str(self._version)})
        except OSError as error:
            log.warning("what this update leaves out is kept in memory only: %s", error)

    def _read(self, file: Path) -> None:
        found = kept(file, {spec.name: (prod(spec.shape),) for spec in self._model.tensors if applies(spec)})
        if found is None:
            return
        residual, facts = found
        if facts.get("version", "").isdecimal():
            self._residual, self._version = residual, int(facts["version"])
