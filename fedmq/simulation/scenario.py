"""A scenario: what is simulated, as a TOML file says it. The tables, and what cannot work, refused at once.

``[aggregator]`` and ``[worker]`` are the production tables. Times are in virtual seconds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from aggregator.config import AggregatorConfig
from broker.errors import ConfigError
from broker.messages import NAME_PATTERN, Rounds
from broker.settings import Flag, Table, load_tables
from fedmq.simulation.attacks import attack_of, bad_workers, flips_labels
from worker_client.config import WorkerConfig

__all__ = [
    "KINDS",
    "DataTable",
    "FaultsTable",
    "NetworkTable",
    "ObjectiveTable",
    "PopulationTable",
    "RunTable",
    "Scenario",
    "load_scenario",
    "scenario_from",
]

Count = Annotated[int, Field(ge=1, le=10**10)]
Share = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]
Some = Annotated[float, Field(gt=0, le=1e9)]

#: Settings of ``[worker]`` that mean nothing for a worker that exists in virtual time only.
NOT_SIMULATED = ("name", "shard", "folder", "delay", "heartbeat_seconds", "max_updates")


class RunTable(Table):
    """``[run]`` of a scenario: its name, what it draws from, when it ends and what is measured."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)] = "simulation"
    """The scenario's name."""
    seed: Annotated[int, Field(ge=0, le=2**53)] = 0
    """Everything is drawn from it: the same seed gives the same bits."""
    updates: Count | None = None
    """End after so many updates that count."""
    versions: Count | None = None
    """End with this version."""
    seconds: Some | None = None
    """End at this virtual time."""
    metric: str | None = None
    """What ``target`` is for; if not set, ``accuracy`` for a task that has it, else ``loss``."""
    target: float | None = None
    """Value of ``metric`` at which it ends."""
    goal: Literal["at-least", "at-most"] | None = None
    """Whether ``target`` is reached from below or from above; must be said of metrics that are not as usual as
    ``accuracy`` or ``loss``."""
    evaluate_every: Count = 1
    """Versions between two evaluations."""
    wire: bool = True
    """Whether updates become bytes and are read again, as over RabbitMQ, in their codec. Without, it is faster."""


class PopulationTable(Table):
    """``[population]``: how many workers there are, how fast, and when they are there."""

    workers: Annotated[int, Field(ge=1, le=10_000_000)] = 10
    """Virtual workers; with a ``trace``, how many shards the data are cut into, if there were more than it names."""
    speed: Literal["constant", "lognormal", "halfnormal", "zipf"] = "constant"
    """How the seconds of a training are spread over the workers: all the same, a heavy tail (``lognormal``), FedBuff's
    ``halfnormal``, or multiples of ``seconds`` that follow Zipf's law."""
    seconds: Some = 1.0
    """Of one training: the median of ``lognormal``, the scale of ``halfnormal`` (to which a hundredth of it is added),
    the shortest of ``zipf``."""
    spread: Annotated[float, Field(gt=0, le=20)] = 1.0
    """``lognormal``: the standard deviation of the logarithm."""
    exponent: Annotated[float, Field(gt=1, le=20)] = 2.0
    """``zipf``: of the law; the smaller, the heavier the tail."""
    longest: Some = 1e6
    """Seconds that no training takes longer than."""
    redraw: bool = False
    """Draw anew for each training, as FedBuff's simulations do; without, a slow worker stays slow."""
    jitter: Annotated[float, Field(ge=0, le=5)] = 0.0
    """Standard deviation of the logarithm of what each training takes more or less."""
    availability: Literal["always", "on-off", "diurnal"] = "always"
    """When workers are there: ``on-off`` comes and goes at random, ``diurnal`` every day at its own hour. Whoever
    leaves says goodbye, and gives up what it was training."""
    on_seconds: Some = 3600.0
    """``on-off``: mean time of being there."""
    off_seconds: Some = 3600.0
    """``on-off``: mean time of being away."""
    day_seconds: Some = 86400.0
    """``diurnal``: length of a day."""
    on_share: Annotated[float, Field(gt=0, le=1)] = 0.5
    """``diurnal``: share of the day on which a worker is there."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a worker disappears for ever during a training, without a goodbye."""
    trace: Path | None = None
    """Trainings that have happened, instead of all that: a run's folder (``--trace``), or a CSV file with the columns
    worker, start and end, in seconds."""


class NetworkTable(Table):
    """``[network]``: between the workers and the aggregator."""

    latency: Seconds = 0.0
    """Seconds that an update travels, and a version."""
    bandwidth: Some | None = None
    """Bytes a second of each worker's line, both ways; no limit if not set."""
    loss: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that a publish is lost. It is not confirmed then, and published again, as the real worker does."""
    duplicates: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Probability that only the confirm is lost, so that an update that has arrived is published again."""
    retry_seconds: Some = 0.5
    """Until the first time that it is published again; twice as long each time after."""


class FaultsTable(Table):
    """``[faults]``: what happens to the aggregator."""

    checkpoint_seconds: Seconds = 0.0
    """How long a checkpoint takes to become durable."""
    crash_every: Some | None = None
    """Mean seconds between crashes of the aggregator, at random times."""
    crash_times: tuple[Some, ...] = ()
    """Crashes at these times."""
    downtime: Seconds = 1.0
    """Seconds until the next aggregator leads, from the last durable checkpoint."""


class DataTable(Table):
    """``[data]``: what of the data each worker has."""

    partition: Literal["task", "iid", "dirichlet", "label", "quantity", "groups"] = "task"
    """``task``: as the task itself cuts it. ``iid``: at random. ``dirichlet``: unlike mixtures of classes. ``label``:
    few classes each. ``quantity``: unlike amounts. ``groups``: natural groups, as the task's ``groups`` names them."""
    alpha: Annotated[float, Field(gt=0, le=1e6)] = 0.3
    """``dirichlet`` and ``quantity``: concentration; the smaller, the less alike."""
    labels: Annotated[int, Field(ge=1)] = 2
    """``label``: classes for each worker."""
    minimum: Annotated[int, Field(ge=1)] = 2
    """Fewest examples of a worker."""


class AttackTable(Table):
    """``[attack]``: bad workers."""

    kind: str = "none"
    """What they send; see docs/simulation.md."""
    share: Share = 0.0
    """Which part of the workers they are, rounded down; those with the highest numbers."""


class ObjectiveTable(Table):
    """``[objective]``: what is learned."""

    kind: Literal["quadratic", "task"] = "quadratic"
    """``quadratic``: a sum of the workers' parabolas, whose minimum is known; costs nothing. ``task``: that of
    ``[worker]``, with real training through torch."""
    dimensions: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """``quadratic``: parameters."""
    heterogeneity: Annotated[float, Field(ge=0, le=1e6)] = 1.0
    """``quadratic``: how far the workers' minima lie from their mean, in each dimension (standard deviation)."""
    condition: Annotated[float, Field(ge=1, le=1e6)] = 10.0
    """``quadratic``: the largest curvature by the smallest; they differ between dimensions and workers."""
    noise: Annotated[float, Field(ge=0, le=1e6)] = 0.0
    """``quadratic``: standard deviation of what each update is off, in each dimension."""
    local_steps: Annotated[int, Field(ge=1, le=10_000)] = 1
    """``quadratic``: gradient steps for one update."""
    local_rate: Annotated[float, Field(gt=0, le=1)] = 0.5
    """``quadratic``: their length, in units of the largest that the steepest dimension bears (2 by its curvature)."""


KINDS: dict[str, type[Table]] = {
    "run": RunTable,
    "aggregator": AggregatorConfig,
    "worker": WorkerConfig,
    "population": PopulationTable,
    "network": NetworkTable,
    "faults": FaultsTable,
    "data": DataTable,
    "attack": AttackTable,
    "objective": ObjectiveTable,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """All tables of one scenario; it can be simulated, as far as that is known before."""

    run: RunTable
    aggregator: AggregatorConfig
    worker: WorkerConfig
    population: PopulationTable
    network: NetworkTable
    faults: FaultsTable
    data: DataTable
    attack: AttackTable
    objective: ObjectiveTable

    @property
    def digest(self) -> str:
        """SHA-256 over all settings that are not the default: whether a result is of this scenario.

        A setting that a later release adds changes nothing, as long as it is not made.
        """
        tables = {name: getattr(self, name).model_dump(mode="json", exclude_defaults=True) for name in KINDS}
        tables["worker"].pop("name", None)  # the host's, and of no meaning here
        trace = self.population.trace
        if trace is not None:
            tables["trace"] = _digest_of(trace / "history.jsonl" if trace.is_dir() else trace)
        return hashlib.sha256(json.dumps(tables, sort_keys=True).encode()).hexdigest()


def _digest_of(file: Path) -> str:
    """Of what is in ``file``; of nothing, if it cannot be read."""
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def load_scenario(file: Path, flags: Sequence[Flag] = ()) -> Scenario:
    """The scenario in ``file``, with ``flags`` on top.

    Raises :class:`ConfigError` for unknown or wrong settings, and for what cannot work together.
    """
    return scenario_from(load_tables(KINDS, file=file, flags=flags))


def scenario_from(tables: Mapping[str, Table]) -> Scenario:
    """The scenario of all of :data:`KINDS`. Raises :class:`ConfigError` for what cannot work together."""
    scenario = Scenario(**tables)  # type: ignore[arg-type]
    _check(scenario)
    return scenario


def _check(scenario: Scenario) -> None:
    run = scenario.run
    if (run.updates, run.versions, run.seconds, scenario.population.trace) == (None, None, None, None):
        raise ConfigError("nothing ends this scenario: set run.updates, versions or seconds (a target may never come)")
    _check_attack(scenario)
    if scenario.objective.kind == "quadratic":
        _check_quadratic(scenario)
    given = scenario.worker.model_fields_set
    useless = [f"worker.{name}" for name in NOT_SIMULATED if name in given]
    if useless:
        raise ConfigError(f"{useless[0]} means nothing in a simulation: [population] says how many workers there are")
    if scenario.worker.local_parameters:
        raise ConfigError(
            "worker.local_parameters is not simulated: what is evaluated is the whole model, and nobody has that; "
            "leave it out"
        )
    aggregator, workers = scenario.aggregator, scenario.population.workers
    for name in ("control_variates", "evaluate_every", "update_seconds"):
        if getattr(aggregator, name):
            raise ConfigError(f"aggregator.{name} is not simulated: simulated workers know nothing of it; leave it out")
    if aggregator.version_codec:
        raise ConfigError(
            "aggregator.version_codec is not simulated: versions are the same for everybody; leave it out"
        )
    if aggregator.update_codec and not scenario.run.wire:
        raise ConfigError(
            "aggregator.update_codec has no effect without the wire: set run.wire = true, or leave it out"
        )
    if scenario.population.trace is not None:
        return  # who is there, it says
    if aggregator.rounds is Rounds.BUFFERED:
        _require_enough_workers(aggregator, workers)
    elif aggregator.minimum_updates > workers:
        raise ConfigError(
            f"aggregator.minimum_updates = {aggregator.minimum_updates} can never be reached: there are {workers} "
            "workers, each of which answers once; take a smaller number, or more population.workers"
        )


def _check_attack(scenario: Scenario) -> None:
    attack, workers = scenario.attack, scenario.population.workers
    attack_of(attack.kind)
    if attack.kind == "none":
        return
    if "share" not in attack.model_fields_set:
        raise ConfigError(f"attack.kind = {attack.kind!r}, and nobody attacks: set attack.share, like 0.2")
    if attack.share and not bad_workers(attack.share, workers) and scenario.population.trace is None:
        raise ConfigError(f"attack.share = {attack.share:g} of {workers} workers is nobody: take more of either")


def _require_enough_workers(aggregator: AggregatorConfig, workers: int) -> None:
    """Raise :class:`ConfigError` if a buffer cannot fill, however long it waits; a deadline closes it with fewer."""
    bounds = {
        "one_per_worker": 1 if aggregator.one_per_worker else None,
        "worker_share": aggregator.most_per_worker,
        "updates_per_version": aggregator.updates_per_version,
    }
    for name, each in bounds.items():
        if each is None or workers * each >= aggregator.buffer_size:
            continue
        if aggregator.deadline is not None and workers * each >= aggregator.minimum_updates:
            continue
        raise ConfigError(
            f"aggregator.buffer_size = {aggregator.buffer_size} can never be reached: by aggregator.{name} each of "
            f"{workers} workers may have {each} in a buffer, {workers * each} in all; take a smaller buffer, more "
            f"population.workers, or another aggregator.{name}"
        )


def _check_quadratic(scenario: Scenario) -> None:
    if scenario.data.partition != "task":
        raise ConfigError(
            f"data.partition = {scenario.data.partition!r} cuts a task's data, and a quadratic has none: "
            "objective.heterogeneity says how unlike its workers are"
        )
    for name in ("proximal", "worker_momentum"):
        if getattr(scenario.aggregator, name):
            raise ConfigError(f"aggregator.{name} is for workers that train a task, and those of a quadratic do not")
    if flips_labels(scenario.attack.kind) and scenario.attack.share:
        raise ConfigError("attack.kind = 'label-flip' changes a task's labels, and a quadratic has none")
