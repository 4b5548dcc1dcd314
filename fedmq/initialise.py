"""``fedmq init``: the first version of a run's parameters, from its task."""

from __future__ import annotations

import time

from aggregator.checkpoint import CheckpointStore
from aggregator.cli import checkpoint_folder
from aggregator.config import AggregatorConfig
from aggregator.core.snapshot import Snapshot
from broker.settings import Settings
from broker.variates import with_variates, zeros
from worker_client.config import WorkerConfig
from worker_client.loading import load_task
from worker_client.training import initial_parameters

__all__ = ["initialise"]


def initialise(settings: Settings) -> Snapshot:
    """Build the task's model and write the run's first checkpoint: version 0.

    Raises:
        TaskError: the task cannot be imported or its model cannot be built.
        CheckpointError: the run has been initialised before, or the folder cannot be written.
    """
    store = CheckpointStore(checkpoint_folder(settings), settings.run)
    worker = settings.table("worker", WorkerConfig)
    model, parameters = initial_parameters(load_task(worker.task), worker.local_parameters)
    if settings.table("aggregator", AggregatorConfig).control_variates:
        model = with_variates(model)
        parameters |= zeros(model)
    return store.create(model, parameters, now=time.time())
