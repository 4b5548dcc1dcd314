"""A whole federation as threads in one process, over the in-process broker or another."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core.snapshot import Snapshot
from aggregator.history import read_history
from aggregator.service import AggregatorService, Outcome
from broker.memory import MemoryBroker
from broker.transport import AggregatorTransport, WorkerTransport
from broker.variates import with_variates, zeros
from worker_client.client import Summary, run_worker
from worker_client.config import WorkerConfig
from worker_client.task import Task
from worker_client.training import initial_parameters

__all__ = ["RUN", "Ended", "Place", "federate"]

RUN = "together"
LIMIT = 60.0


class Place(Protocol):
    """Where the members meet."""

    def aggregator(self, run: str, *, prefetch: int) -> AggregatorTransport:
        """The aggregator's transport."""

    def worker(self, run: str, name: str) -> WorkerTransport:
        """A worker's."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A run that is over."""

    outcome: Outcome
    summaries: Mapping[str, Summary]
    snapshot: Snapshot
    history: list[dict[str, Any]]

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """The history's lines of a kind."""
        return [line for line in self.history if line["kind"] == kind]


def federate(
    folder: Path,
    task: Task,
    settings: Mapping[str, Any],
    workers: Mapping[str, Mapping[str, Any]],
    *,
    meters: Mapping[str, Any] | None = None,
    place: Place | None = None,
    **common: Any,
) -> Ended:
    """Run to the end, which ``settings`` must set.

    Args:
        folder: for the aggregator's files, and for each worker's under ``workers``.
        task: what is trained.
        settings: ``[aggregator]``.
        workers: by name, what differs from ``common``.
        meters: what counts, by the worker's name, and of ``aggregator``.
        place: where they meet; an in-process broker, if None.
        common: ``[worker]``.
    """
    config = AggregatorConfig.model_validate({"linger": 5.0, **settings})
    store = CheckpointStore(folder / "checkpoints", RUN)
    if not store.files():
        model, parameters = initial_parameters(task, common.get("local_parameters", ()))
        if config.control_variates:
            model = with_variates(model)
            parameters |= zeros(model)
        store.create(model, parameters, now=0.0)
    size = store.load().model.nbytes
    broker, stop = place or MemoryBroker(), threading.Event()
    meters = meters or {}
    service = AggregatorService(
        folder=folder,
        run=RUN,
        config=config,
        store=CheckpointStore(folder / "checkpoints", RUN),
        meter=meters.get("aggregator"),
    )

    def work(name: str) -> Summary:
        values = {"name": name, "device": "cpu", "heartbeat_seconds": 0.2, "folder": folder / "workers" / name}
        own = WorkerConfig.model_validate({**values, **common, **workers[name]})
        return run_worker(own, RUN, broker.worker(RUN, name), task, stop=stop, meter=meters.get(name))

    with ThreadPoolExecutor(len(workers) + 1) as pool:
        try:
            leader = pool.submit(service.run, broker.aggregator(RUN, prefetch=config.prefetch(size)))
            members = {name: pool.submit(work, name) for name in workers}
            summaries = {name: member.result(LIMIT) for name, member in members.items()}
            outcome = leader.result(LIMIT)
            assert outcome is not None
        finally:
            stop.set()
            service.stop()
    return Ended(outcome, summaries, store.load(), list(read_history(folder / "history.jsonl")))
