"""From a scenario to its result."""

from __future__ import annotations

import time
from importlib import import_module

from broker.errors import TaskError
from fedmq.simulation.objectives import Objective
from fedmq.simulation.population import names_of
from fedmq.simulation.quadratic import Quadratic
from fedmq.simulation.record import Result
from fedmq.simulation.scenario import Scenario
from fedmq.simulation.world import World

__all__ = ["objective_of", "run_with_split", "simulate"]


def objective_of(scenario: Scenario) -> Objective:
    """What the workers of ``scenario`` learn.

    Raises :class:`TaskError` and :class:`ConfigError` if that cannot be had.
    """
    if scenario.objective.kind == "task":
        _require_torch()
        from fedmq.simulation.tasks import TaskObjective  # noqa: PLC0415 (needs torch)

        return TaskObjective(scenario, names_of(scenario.population.workers))
    return Quadratic(
        scenario.objective,
        workers=scenario.population.workers,
        mode=scenario.aggregator.mode,
        seed=scenario.run.seed,
    )


def _require_torch() -> None:
    try:
        import_module("torch")
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise TaskError('a scenario with real training needs torch: pip install "fedmq[torch]"') from None


def simulate(scenario: Scenario) -> Result:
    """Let ``scenario`` happen. The same scenario gives the same result, to the last bit.

    Raises:
        ConfigError: it comes to a standstill, or measures something that is not there.
        FedmqError: what would have ended the aggregator or a worker.
    """
    return World(scenario, objective_of(scenario)).run()


def run_with_split(scenario: Scenario) -> tuple[Result, list[list[int]] | None, float]:
    """As :func:`simulate`; also the examples by worker and class, if there are any, and the seconds that it took."""
    started = time.monotonic()
    objective = objective_of(scenario)
    result = World(scenario, objective).run()
    took = time.monotonic() - started
    counts = objective.counts()
    return result, None if counts is None else counts.tolist(), took
