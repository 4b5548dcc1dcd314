"""What a round machine wants done. Frozen values; the shell does it and reports the outcome as an event."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.core.federated import Federated
from aggregator.core.snapshot import Entry, Snapshot, VersionRecord
from broker.messages import ModelSpec, Plan, Reason, Role, Tensors, UpdateId
from broker.transport import Token

__all__ = [
    "Ack",
    "Broadcast",
    "Came",
    "Effect",
    "EvaluationRecord",
    "Executed",
    "Fact",
    "Fetch",
    "Finish",
    "Folded",
    "Quarantined",
    "Record",
    "Reject",
    "Rejected",
    "Released",
    "Repeated",
    "Tell",
    "VersionMade",
    "WakeAt",
    "Warn",
    "Went",
    "WriteCheckpoint",
]


@dataclass(frozen=True, slots=True)
class WriteCheckpoint:
    """Make ``snapshot`` durable, then say ``CheckpointWritten(commit)`` or ``CheckpointFailed``.

    Say ``CheckpointCopied`` before, as soon as its accumulator has been read: whoever does not makes the next fold
    copy it.
    """

    commit: int
    snapshot: Snapshot


@dataclass(frozen=True, slots=True)
class Ack:
    """The update behind ``token`` is durable (or was before): the broker may forget it."""

    token: Token


@dataclass(frozen=True, slots=True)
class Fetch:
    """Get the chunks of the announced update behind ``token``, then say ``Arrived`` or ``Unreadable``."""

    token: Token


@dataclass(frozen=True, slots=True)
class Reject:
    """Move the update behind ``token`` to the dead letters."""

    token: Token
    reason: Reason
    detail: str


@dataclass(frozen=True, slots=True)
class Tell:
    """Let the worker know that its update was rejected. May get lost."""

    worker: str
    reason: Reason
    detail: str
    update: UpdateId | None = None


@dataclass(frozen=True, slots=True)
class Broadcast:
    """Give this durable version to all workers."""

    epoch: int
    version: int
    plan: Plan
    digest: str
    model: ModelSpec
    parameters: Tensors


@dataclass(frozen=True, slots=True)
class WakeAt:
    """Say ``Tick`` at this time at the latest."""

    time: float


@dataclass(frozen=True, slots=True)
class Finish:
    """Nothing is left to do; leave."""

    reason: str


# ------------------------------------------------------------------------------------- facts to record and show


@dataclass(frozen=True, slots=True)
class Folded:
    """An update went into the buffer."""

    entry: Entry
    fill: int
    """Updates in the buffer now."""
    goal: int
    """Updates at which the round closes, as far as is known now."""
    seconds: float
    """How long the worker trained."""


@dataclass(frozen=True, slots=True)
class Rejected:
    """An update was rejected, or ``count`` were, unread."""

    worker: str
    reason: Reason
    detail: str
    update: UpdateId | None = None
    count: int = 1


@dataclass(frozen=True, slots=True)
class Repeated:
    """An update came again that is in the model, or will be; it counted once."""

    id: UpdateId


@dataclass(frozen=True, slots=True)
class VersionMade:
    """A version is durable."""

    record: VersionRecord


@dataclass(frozen=True, slots=True)
class EvaluationRecord:
    """An evaluator's figures for a version."""

    worker: str
    version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Executed:
    """An operator's command is durable, and in force unless a round must close first."""

    command: str
    version: int
    is_pending: bool
    is_done: bool = False
    """The run has ended all the same."""


@dataclass(frozen=True, slots=True)
class Warn:
    """Something that an operator should know."""

    text: str


@dataclass(frozen=True, slots=True)
class Came:
    """A worker is here (again)."""

    worker: str
    role: Role


@dataclass(frozen=True, slots=True)
class Went:
    """A worker has left, or was silent for too long."""

    worker: str
    role: Role
    reason: str
    """What its goodbye said; empty if it said none."""


@dataclass(frozen=True, slots=True)
class Quarantined:
    """A worker's updates are not taken for a while, for those that it sent before."""

    worker: str
    version: int
    """The newest one."""
    score: float
    until: float
    """Seconds since 1970."""


@dataclass(frozen=True, slots=True)
class Released:
    """A worker's quarantine has ended."""

    worker: str
    version: int
    """The newest one."""


Fact = (
    Came
    | Went
    | Folded
    | Rejected
    | Repeated
    | VersionMade
    | EvaluationRecord
    | Federated
    | Executed
    | Quarantined
    | Released
    | Warn
)


@dataclass(frozen=True, slots=True)
class Record:
    """Count, show and log ``fact``."""

    fact: Fact


Effect = WriteCheckpoint | Ack | Fetch | Reject | Tell | Broadcast | WakeAt | Finish | Record
