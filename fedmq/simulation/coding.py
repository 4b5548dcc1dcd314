"""Updates in the codec that the plan asks for, by the worker's own code, what a codec leaves out included."""

from __future__ import annotations

from dataclasses import replace

from broker.messages import ModelSpec, Parameters
from fedmq.simulation.objectives import Work

__all__ = ["Coders"]


class Coders:
    """One compressor for each worker that has sent something."""

    def __init__(self, model: ModelSpec, names: list[str], life: str) -> None:
        self._model, self._names, self._life = model, names, life
        self._own: dict[int, object] = {}

    def coded(self, worker: int, work: Work, base: Parameters, ordinal: int) -> Work:
        """``work`` as it is sent. Raises :class:`ConfigError` for an unknown codec."""
        if not base.plan.codec:
            return work
        # Only here is torch needed, which the worker's room is made of.
        from worker_client.compression import Compressor  # noqa: PLC0415
        from worker_client.training import Trained  # noqa: PLC0415

        who = f"{self._names[worker]} {self._life}"
        compressor = self._own.get(worker)
        if not isinstance(compressor, Compressor):
            compressor = self._own[worker] = Compressor(None, who, self._model)
        tensors = dict(work.tensors)
        trained = Trained(tensors=tensors, examples=work.examples, metrics=work.metrics, seconds=0.0)  # type: ignore[arg-type]
        coded = compressor(trained, base, ordinal)
        if coded.encoded is None:
            return work
        return replace(work, tensors=coded.encoded, codec=coded.codec, seed=coded.seed)
