"""All that a restart needs, in one value: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from aggregator.optimizers import OptimizerState
from aggregator.strategies.base import Accumulator
from broker.messages import ModelSpec, Tensors, UpdateId

__all__ = ["Entry", "Snapshot", "VersionRecord"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One folded update, as the history will tell it."""

    id: UpdateId
    base_version: int
    staleness: int
    weight: float
    examples: int
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class VersionRecord:
    """How a version came to be: one line of the run's history."""

    version: int
    epoch: int
    time: float
    """Seconds since 1970, by the aggregator's clock."""
    seconds: float
    """Since the round was opened."""
    updates: tuple[Entry, ...]
    loss: float | None
    """Mean training loss of the updates, by examples."""
    before: str
    """Digest of the parameters that the round started from."""
    after: str
    """Digest of this version's parameters."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The durable state of a run.

    Arrays are borrowed, not copied: whoever holds a snapshot may read them until the machine is told that the
    checkpoint is written (or failed); the machine does not write into them before.
    """

    run: str
    model: ModelSpec
    epoch: int
    version: int
    parameters: Tensors
    digest: str
    optimizer: OptimizerState
    accumulator: Accumulator
    entries: tuple[Entry, ...] = ()
    """Updates in the accumulator, in the order in which they were folded."""
    ledger: Mapping[str, Mapping[str, list[list[int]]]] = field(default_factory=dict)
    records: tuple[VersionRecord, ...] = ()
    """Versions made since the last checkpoint: the history file may not have them yet."""
    confirmed: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """Updates that workers know to be confirmed, by worker and incarnation."""
    trainers: tuple[str, ...] = ()
    """Workers that were present."""
    rejected: Mapping[str, int] = field(default_factory=dict)
    """Rejections so far, by reason."""
    mode: str = ""
    """What the run's updates are; empty before the first aggregator has decided it."""
    started: float = 0.0
    """When the run began, seconds since 1970."""
    done: bool = False
