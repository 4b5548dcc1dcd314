"""What a run is like. Values only: the same rules and events give the same effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregator.core.fairness import Fairness
from aggregator.core.rounds import RoundRule
from aggregator.core.screen import NormLimits
from aggregator.core.standing import QuarantinePolicy
from aggregator.optimizers import Optimizer
from aggregator.schedules import Schedule, constant, factor_at
from aggregator.strategies.base import Strategy
from broker.messages import Mode, Scalar, Work

__all__ = ["CommitPolicy", "Rules"]


@dataclass(frozen=True, slots=True)
class CommitPolicy:
    """When to commit in the middle of a round, so that long rounds pile up nothing unacknowledged."""

    count: int = 32
    """Unacknowledged updates. Must stay below the consumer's prefetch, or a round could never fill."""
    nbytes: int = 256 * 2**20
    """Bytes of unacknowledged updates."""
    seconds: float = 60.0
    """Age of the oldest unacknowledged update; far below RabbitMQ's acknowledgement timeout of 30 minutes."""


@dataclass(frozen=True, slots=True)
class Rules:
    """The rules of one run; an operator may change them from one round to the next."""

    mode: Mode
    rounds: RoundRule
    strategy: Strategy
    optimizer: Optimizer
    schedule: Schedule = constant
    """Of the optimiser's learning rate."""
    seed: int = 0
    work: Work = field(default_factory=Work)
    """How workers are asked to make updates."""
    control_variates: bool = False
    """Whether the run is one of SCAFFOLD."""
    codec: str = ""
    """In which code workers are asked to send updates; empty for none."""
    stop_after_rounds: int | None = None
    commit: CommitPolicy = field(default_factory=CommitPolicy)
    fairness: Fairness = field(default_factory=Fairness)
    """Whether updates are weighed by their workers' rates."""
    norms: NormLimits = field(default_factory=NormLimits)
    max_examples: int | None = None
    """The most that an update may claim; None for any."""
    quarantine: QuarantinePolicy = field(default_factory=QuarantinePolicy)
    worker_timeout: float = 15.0
    """Seconds of silence after which a worker counts as gone."""
    retry_seconds: float = 5.0
    """Before workers are asked again for a round that cannot complete, and before a failed commit is repeated."""
    linger_seconds: float = 30.0
    """How long a finished run waits for its workers' goodbyes and its evaluators' last figures."""
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    """The settings behind these rules that decide the numbers, for the run's lineage."""

    def optimizer_at(self, version: int) -> Optimizer:
        """What makes the step from ``version``. Raises :class:`StrategyError` if the schedule fails."""
        return self.optimizer.scaled(factor_at(self.schedule, version))

    @property
    def needs_effort(self) -> bool:
        """Whether the strategy goes by how much each worker did, so that updates must say it."""
        return bool(getattr(self.strategy, "needs_effort", False))
