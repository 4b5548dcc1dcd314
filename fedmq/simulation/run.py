"""From a scenario to its result."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

from broker.errors import ConfigError, FedmqError, TaskError
from broker.messages import Rounds
from fedmq.simulation.objectives import Objective
from fedmq.simulation.population import names_of
from fedmq.simulation.quadratic import Quadratic
from fedmq.simulation.record import Result
from fedmq.simulation.scenario import Scenario
from fedmq.simulation.traces import Trace, load_trace
from fedmq.simulation.world import World

__all__ = ["objective_of", "run_with_split", "simulate", "trace_of"]


def objective_of(scenario: Scenario) -> Objective:
    """What the workers of ``scenario`` learn.

    Raises :class:`TaskError` and :class:`ConfigError` if that cannot be had.
    """
    if scenario.objective.kind == "task":
        _require_torch()
        from fedmq.simulation.tasks import TaskObjective  # noqa: PLC0415 (needs torch)

        return TaskObjective(scenario, _names(scenario), shards=_shards(scenario))
    return Quadratic(
        scenario.objective,
        workers=len(_names(scenario)),
        mode=scenario.aggregator.mode,
        seed=scenario.run.seed,
    )


def trace_of(scenario: Scenario) -> Trace | None:
    """The trace that ``scenario`` names. Raises :class:`ConfigError`."""
    path = scenario.population.trace
    return None if path is None else load_trace(path)


def _names(scenario: Scenario) -> list[str]:
    trace = trace_of(scenario)
    return names_of(scenario.population.workers) if trace is None else trace.names


def _shards(scenario: Scenario) -> int:
    """Into how many the data are cut: workers of a trace may have been there without an update that counted."""
    names, population = _names(scenario), scenario.population
    return max(len(names), population.workers) if "workers" in population.model_fields_set else len(names)


def _world(scenario: Scenario) -> World:
    trace = trace_of(scenario)
    if trace is not None and scenario.aggregator.rounds is Rounds.BUFFERED:
        size = scenario.aggregator.buffer_size
        if len(trace.jobs) < size:
            raise ConfigError(
                f"aggregator.buffer_size = {size} can never be reached: the trace has {len(trace.jobs)} updates"
            )
    return World(scenario, objective_of(scenario), trace)


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
    with _enough_memory(scenario):
        return _world(scenario).run()


@contextmanager
def _enough_memory(scenario: Scenario) -> Iterator[None]:
    """Say what takes the memory that there is not."""
    try:
        yield
    except MemoryError as error:
        table = scenario.objective
        what = f" of {table.dimensions:,} dimensions" if table.kind == "quadratic" else ""
        raise FedmqError(
            f"no memory left for {scenario.population.workers:,} workers{what} ({error}); take fewer population.workers"
            + (" or objective.dimensions" if what else "")
        ) from None


def run_with_split(scenario: Scenario) -> tuple[Result, list[list[int]] | None, float]:
    """As :func:`simulate`; also the examples by worker and class, if there are any, and the seconds that it took."""
    started = time.monotonic()
    with _enough_memory(scenario):
        world = _world(scenario)
        result = world.run()
        took = time.monotonic() - started
        counts = world.objective.counts()
    return result, None if counts is None else counts.tolist(), took
