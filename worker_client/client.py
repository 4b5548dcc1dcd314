"""A worker from beginning to end: ``run_worker`` trains, ``run_evaluator`` evaluates."""

from __future__ import annotations

import logging

from broker.messages import Role
from broker.settings import CHUNK_BYTES
from broker.transport import WorkerTransport
from worker_client.config import WorkerConfig
from worker_client.core import EvaluatorMachine, WorkerMachine
from worker_client.guard import Identity
from worker_client.meter import Meter
from worker_client.outbox import Outbox
from worker_client.session import GRACE, Session, StopSignal, Summary
from worker_client.task import Task
from worker_client.training import Trainer

__all__ = ["GRACE", "StopSignal", "Summary", "run_evaluator", "run_worker"]

log = logging.getLogger("fedmq.worker")


def run_worker(
    config: WorkerConfig,
    run: str,
    transport: WorkerTransport,
    task: Task,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    pack_chunks: bool = False,
    stop: StopSignal | None = None,
    grace: float = GRACE,
    meter: Meter | None = None,
) -> Summary:
    """Train for ``run`` until it is over, ``max_updates`` is reached or ``stop`` is set.

    With ``config.folder`` the worker keeps its identity there; without, it is a new one each time. The
    transport is opened and closed here. Updates that are larger than ``chunk_bytes`` travel in chunks,
    packed if that makes them smaller with ``pack_chunks``. ``meter`` counts what is done.

    Raises:
        ConfigError: a file of keys cannot be used.
        TaskError: the task raised, or its shard is empty.
        ModelMismatch: the run's model is not the task's.
        CheckpointError: the folder cannot be used.
        BrokerError: the broker refuses this worker for good, or an update is too large for it.
    """
    identity = Identity.load(config, run)
    trainer = Trainer(task, config)
    examples = trainer.load_data()
    held = f", and {trainer.held_out} held out" if trainer.held_out else ""
    log.info("worker %s: %d examples%s in %s", config.name, examples, held, trainer.shard)
    outbox = Outbox.open(config.folder, run, config.name)
    machine = WorkerMachine(
        config.name, outbox.incarnation, max_updates=config.max_updates, can_check=trainer.held_out > 0
    )
    try:
        return Session(
            config,
            run,
            transport=transport,
            trainer=trainer,
            outbox=outbox,
            identity=identity,
            machine=machine,
            role=Role.TRAINER,
            chunk_bytes=chunk_bytes,
            pack_chunks=pack_chunks,
            stop=stop,
            grace=grace,
            meter=meter,
        ).run()
    finally:
        outbox.close()


def run_evaluator(
    config: WorkerConfig,
    run: str,
    transport: WorkerTransport,
    task: Task,
    *,
    chunk_bytes: int = CHUNK_BYTES,
    pack_chunks: bool = False,
    stop: StopSignal | None = None,
    grace: float = GRACE,
    meter: Meter | None = None,
) -> Summary:
    """Evaluate ``run``'s newest version on the task's held-out data, each time there is a newer one.

    Publishes an event of kind ``evaluation`` for each; returns after the run's last version. Raises as
    :func:`run_worker`.
    """
    config.require_whole_model("an evaluator")
    identity = Identity.load(config, run)
    trainer = Trainer(task, config)
    log.info("evaluator %s: %d held-out examples", config.name, trainer.load_test_data())
    return Session(
        config,
        run,
        transport=transport,
        trainer=trainer,
        outbox=Outbox.open(None, run, config.name),
        identity=identity,
        machine=EvaluatorMachine(),
        role=Role.EVALUATOR,
        chunk_bytes=chunk_bytes,
        pack_chunks=pack_chunks,
        stop=stop,
        grace=grace,
        meter=meter,
    ).run()
