"""From a scenario to its result."""

from __future__ import annotations

from fedmq.simulation.objectives import Objective
from fedmq.simulation.quadratic import Quadratic
from fedmq.simulation.record import Result
from fedmq.simulation.scenario import Scenario
from fedmq.simulation.world import World

__all__ = ["objective_of", "simulate"]


def objective_of(scenario: Scenario) -> Objective:
    """What the workers of ``scenario`` learn."""
    return Quadratic(
        scenario.objective,
        workers=scenario.population.workers,
        mode=scenario.aggregator.mode,
        seed=scenario.run.seed,
    )


def simulate(scenario: Scenario) -> Result:
    """Let ``scenario`` happen. The same scenario gives the same result, to the last bit.

    Raises:
        ConfigError: it comes to a standstill, or measures something that is not there.
        FedmqError: what would have ended the aggregator or a worker.
    """
    return World(scenario, objective_of(scenario)).run()
