"""All that a restart needs, in one value: what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from aggregator.core.ledger import PlainLedger
from aggregator.core.standing import Standing
from aggregator.optimizers import OptimizerState
from aggregator.strategies.base import Accumulator
from broker.errors import ConfigError
from broker.messages import Array, Mode, ModelSpec, Scalar, Tensors, UpdateId, parameters_digest
from broker.variates import has_variates

__all__ = ["Changes", "Entry", "Folds", "Snapshot", "SnapshotHead", "VersionRecord", "rolled_back"]

#: Settings of the table ``[aggregator]`` that were changed while the run went on.
Changes = Mapping[str, Scalar]

#: How many updates, one after the other, were folded under which settings (``Rules.settings``).
Folds = tuple[tuple[int, Mapping[str, Scalar]], ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """One folded update, as the history will tell it."""

    id: UpdateId
    base_version: int
    staleness: int
    weight: float
    examples: int
    loss: float | None = None
    steps: int = 0
    """Local steps; 0 if the worker did not say."""
    seconds: float = 0.0
    """How long the worker trained, as it says, to a tenth of a millisecond; 0 if that is no time."""
    factor: float = 1.0
    """What its weight was multiplied by for its worker's rate."""
    norm: float | None = None
    """Of its parameters together; None if it was not calculated."""
    cosine: float | None = None
    """With what its round made of all updates, once there is a version of it (``aggregator.core.sketch``)."""


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
    settings: Mapping[str, Scalar] = field(default_factory=dict)
    """What made it: strategy, weights, optimiser and the like."""
    source: int | None = None
    """The earlier version whose parameters these are, if the run was taken back or the step was not finite; there
    are no updates then."""
    dropped: tuple[Entry, ...] = ()
    """Updates that were in the buffer then. They count nowhere, now or later."""
    step: int | None = None
    """Steps that the optimiser had made before this one; 0 if it began without memory. None if it is not known."""
    folds: Folds = ()
    """If a restart changed the settings in mid-round: how many updates went in under which."""
    without: tuple[str, ...] = ()
    """Workers whose updates were left out when the parameters of ``source`` were rebuilt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SnapshotHead:
    """The durable state of a run without its arrays: what can be told of a checkpoint in a moment."""

    run: str
    model: ModelSpec
    epoch: int
    version: int
    digest: str
    entries: tuple[Entry, ...] = ()
    """Updates in the accumulator, in the order in which they were folded."""
    folds: Folds = ()
    """Under which settings they were."""
    ledger: PlainLedger = field(default_factory=dict)
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
    void: tuple[tuple[int, int], ...] = ()
    """Versions that were taken back, as first and last."""
    changes: Changes = field(default_factory=dict)
    """What was changed on the running run and is in force."""
    pending: Changes | None = None
    """What is to be in force from the next round on instead; None if that is ``changes``."""
    paused: bool = False
    commands: tuple[str, ...] = ()
    """The newest commands that were executed, by id."""
    kept_from: int | None = None
    """Every update applied after this version is in the archive, and the version's state too; None if not."""
    recent: tuple[str, ...] = ()
    """Whose the updates were that were folded last, where updates are weighed by that; the newest is the last."""
    worker_norms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """Of the updates that came last, by worker; who was heard last is last."""
    standings: Mapping[str, Standing] = field(default_factory=dict)
    """What is held against workers, by name."""

    def require_mode(self, mode: Mode) -> None:
        """Raise :class:`ConfigError` if the run has been going on with another mode than ``mode``."""
        if self.mode not in ("", mode.value):
            raise ConfigError(
                f"aggregator.mode = {mode.value!r}, but run {self.run!r} has been going on with {self.mode!r}; "
                "the mode of a run cannot change"
            )

    def require_variates(self, *, wanted: bool) -> None:
        """Raise :class:`ConfigError` if the run began with control variates and goes on without, or the reverse."""
        if has_variates(self.model) is not wanted:
            began, now = ("without", "false") if wanted else ("with", "true")
            raise ConfigError(
                f"aggregator.control_variates = {str(wanted).lower()}, but run {self.run!r} began {began} control "
                f"variates: leave it at {now}, or begin another run ('fedmq init') with it"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot(SnapshotHead):
    """The durable state of a run.

    Arrays are borrowed, not copied: whoever holds a snapshot may read those of the accumulator until the machine
    is told that they are copied, or that the checkpoint is written or failed; the machine does not write into them
    before. All others are replaced, never written into. An accumulator without updates is left out.
    """

    parameters: Tensors
    optimizer: OptimizerState
    accumulator: Accumulator
    sketches: tuple[Array, ...] = ()
    """Of the updates in the accumulator, each of the same length, for their cosines; none in earlier checkpoints."""


def rolled_back(
    snapshot: Snapshot,
    *,
    to: int,
    head: int,
    parameters: Tensors,
    optimizer: OptimizerState,
    now: float,
    drop: bool = True,
    since: int | None = None,
    without: tuple[str, ...] = (),
) -> Snapshot:
    """``snapshot`` with version ``to``'s state as its newest version, number ``head + 1``.

    Version numbers never come twice, so nobody can take one state for another. Updates that start from a
    version in between are void, and what was applied in between stays in the ledger: it does not count again.

    Args:
        snapshot: the newest durable state.
        to: the version that comes back.
        head: the newest version that anyone can have seen.
        parameters: those of version ``to``.
        optimizer: the optimiser's state at version ``to``.
        now: seconds since 1970.
        drop: leave out what is in the buffer, which may come from versions in between.
        since: the first version that is taken back, if that is not the one after ``to``.
        without: workers whose updates were left out when ``parameters`` were rebuilt.
    """
    void = (to + 1 if since is None else since, head)
    is_kept = snapshot.kept_from is not None and snapshot.kept_from <= to
    digest = parameters_digest(parameters)
    record = VersionRecord(
        version=head + 1,
        epoch=snapshot.epoch,
        time=now,
        seconds=0.0,
        updates=(),
        loss=None,
        before=snapshot.digest,
        after=digest,
        source=to,
        dropped=snapshot.entries if drop else (),
        without=without,
    )
    return replace(
        snapshot,
        version=head + 1,
        parameters=parameters,
        digest=digest,
        optimizer=optimizer,
        accumulator=Accumulator() if drop else snapshot.accumulator,
        entries=() if drop else snapshot.entries,
        sketches=() if drop else snapshot.sketches,
        folds=() if drop else snapshot.folds,
        records=(*snapshot.records, record),
        void=(*snapshot.void, void) if void[0] <= head else snapshot.void,
        done=False,
        kept_from=snapshot.kept_from if is_kept else None,
    )
