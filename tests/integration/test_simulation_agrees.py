"""The simulator and a real aggregator with real workers: the same order of updates gives the same bits."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.service import AggregatorService
from broker.memory import MemoryBroker
from fedmq.simulation.run import simulate
from tests.support.scenarios import scenario_of
from tests.support.tasks import Line
from worker_client.client import run_worker
from worker_client.config import WorkerConfig
from worker_client.training import initial_parameters

WORKERS = {"site0": "0/2", "site1": "1/2"}
TRAINING: dict[str, Any] = {"learning_rate": 0.02, "batch_size": 16, "local_epochs": 1, "device": "cpu"}


def really(folder: Path, config: AggregatorConfig) -> str:
    """Train with threads over the in-process broker; the digest of the last version."""
    broker, store, stop = MemoryBroker(), CheckpointStore(folder / "checkpoints", "agrees"), threading.Event()
    model, parameters = initial_parameters(Line())
    store.create(model, parameters, now=0.0)
    service = AggregatorService(folder=folder, run="agrees", config=config, store=store)
    problems: list[BaseException] = []

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 (handed to the test)
            problems.append(error)

    def worker(name: str) -> None:
        settings = WorkerConfig(name=name, shard=WORKERS[name], heartbeat_seconds=0.2, **TRAINING)
        run_worker(settings, "agrees", broker.worker("agrees", name), Line(), stop=stop)

    tasks = [lambda: service.run(broker.aggregator("agrees", prefetch=config.prefetch(model.nbytes)))]
    tasks += [lambda name=name: worker(name) for name in WORKERS]  # type: ignore[misc]
    threads = [threading.Thread(target=guarded, args=(task,), daemon=True) for task in tasks]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join(60)
            assert not thread.is_alive()
    finally:
        stop.set()
        service.stop()
    assert not problems
    return store.load().digest


@pytest.mark.parametrize(
    "settings",
    [
        {"buffer_size": 3, "max_staleness": 1000},
        # Both from the first round on: a history does not tell who was waited for.
        {"rounds": "synchronous", "minimum_updates": 2, "optimizer": "adam", "learning_rate": 0.05},
        {"buffer_size": 2, "max_staleness": 1000, "momentum": 0.5, "updates_per_version": 1},
    ],
    ids=["buffered", "synchronous", "momentum"],
)
def test_a_run_simulated_from_its_lineage_gives_the_same_parameters(
    tmp_path: Path, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    settings = settings | {"stop_after_rounds": 6, "linger": 0.2}
    for attempt in range(3):
        folder = tmp_path / str(attempt)
        real = really(folder, AggregatorConfig.model_validate(settings))
        # On a machine that stood still workers are asked again, and shuffle anew; the history does not tell that.
        if "asking the workers again" not in caplog.text:
            break
        caplog.clear()

    changes = {f"aggregator.{key}": value for key, value in settings.items()}
    changes |= {f"worker.{key}": value for key, value in TRAINING.items()}
    result = simulate(
        scenario_of(
            tmp_path,
            changes
            | {
                "run.updates": None,
                "run.versions": 6,
                "population.trace": str(folder),
                "objective.kind": "task",
                "worker.task": "tests.support.tasks:Line",
            },
        )
    )

    assert result.versions == 6
    assert result.digest == real
