"""From a version to what is published: training, and what the run asks to be done with its outcome."""

from __future__ import annotations

from collections.abc import Callable

from broker.messages import Parameters
from worker_client.compression import Compressor
from worker_client.config import WorkerConfig
from worker_client.momentum import Momentum
from worker_client.training import Trained, Trainer
from worker_client.variates import Variates

__all__ = ["Preparation"]


class Preparation:
    """One worker's way of making updates.

    Args:
        config: of the worker.
        who: its name and incarnation.
        trainer: trains.
        variates: what SCAFFOLD adds.
    """

    def __init__(self, config: WorkerConfig, who: str, trainer: Trainer, variates: Variates) -> None:
        self._trainer = trainer
        self._variates = variates
        self._average = Momentum(config.folder, trainer.spec)
        self._compress = Compressor(config.folder, who, trainer.spec)

    def __call__(self, base: Parameters, ordinal: int, should_stop: Callable[[], bool]) -> Trained:
        """What is to be published for training number ``ordinal`` from ``base``. Raises as :meth:`Trainer.train`.

        Variates first: they are made of what the steps moved, and not of an average.
        """
        shift = self._variates.shift(base)
        trained = self._trainer.train(base, ordinal, should_stop, shift=shift)
        if shift is not None:
            trained = self._variates.complete(trained, base, shift)
        return self._compress(self._average(trained, base), base, ordinal)
