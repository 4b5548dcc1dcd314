"""From a version to what is published: training, and what the run asks to be done with its outcome."""

from __future__ import annotations

import time
from collections.abc import Callable

from broker.messages import Mode, Parameters
from worker_client.compression import Compressor
from worker_client.config import WorkerConfig
from worker_client.core.pace import Pace, steps_for
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
        self._delay = config.delay
        self._trainer = trainer
        self._variates = variates
        self._average = Momentum(config.folder, trainer.spec)
        self._compress = Compressor(config.folder, who, trainer.spec)
        self._pace: Pace | None = None

    def __call__(self, base: Parameters, ordinal: int, should_stop: Callable[[], bool]) -> Trained:
        """What is to be published for training number ``ordinal`` from ``base``. Raises as :meth:`Trainer.train`.

        Variates first: they are made of what the steps moved, and not of an average.
        """
        started = time.monotonic()
        steps = None if base.plan.mode is Mode.GRADIENT else steps_for(base.plan.work, self._pace)
        shift = self._variates.shift(base)
        trained = self._trainer.train(base, ordinal, should_stop, shift=shift, steps=steps)
        if shift is not None:
            trained = self._variates.complete(trained, base, shift)
        ready = self._compress(self._average(trained, base), base, ordinal)
        if made := trained.steps:
            rest = time.monotonic() - started - trained.stepping + self._delay
            now = self._pace or Pace.of(made, trained.stepping, rest)
            self._pace = now.after(made, trained.stepping, rest)
        return ready
