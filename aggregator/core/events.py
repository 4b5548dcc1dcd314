"""What happens to a round machine. Frozen values; the shell makes them from deliveries and outcomes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from aggregator.core.controls import Order
from broker.messages import Action, Goodbye, Hello, ModelSpec, Reason, Role, Update, UpdateHead, UpdateId
from broker.transport import Token

__all__ = [
    "Announced",
    "Arrived",
    "Checked",
    "CheckpointCopied",
    "CheckpointFailed",
    "CheckpointWritten",
    "Evaluated",
    "Happening",
    "Joined",
    "Left",
    "LinkLost",
    "LinkUp",
    "Ordered",
    "Seen",
    "Shut",
    "StopRequested",
    "Tick",
    "Unreadable",
]


@dataclass(frozen=True, slots=True)
class Arrived:
    """An update that could be decoded. ``nbytes`` is the size of its message."""

    token: Token
    update: Update
    nbytes: int


@dataclass(frozen=True, slots=True)
class Announced:
    """An update in chunks that were not fetched yet, as its manifest tells of it."""

    token: Token
    head: UpdateHead
    model: ModelSpec


@dataclass(frozen=True, slots=True)
class Unreadable:
    """A message in the update queue that is no usable update."""

    token: Token
    reason: Reason
    detail: str
    worker: str = ""
    update: UpdateId | None = None
    """Its id, if that could be read."""


@dataclass(frozen=True, slots=True)
class Joined:
    """A worker said hello."""

    hello: Hello


@dataclass(frozen=True, slots=True)
class Left:
    """A worker said goodbye."""

    goodbye: Goodbye


@dataclass(frozen=True, slots=True)
class Seen:
    """A worker's heartbeat."""

    worker: str
    incarnation: str
    role: Role
    confirmed: int
    waiting: int | None = None
    """The version that it has and whose successor it waits for; None if it has something to do."""


@dataclass(frozen=True, slots=True)
class Ordered:
    """An operator's command that makes sense. ``order`` comes with ``set``."""

    token: Token
    command: str
    """Its id."""
    action: Action
    order: Order | None = None
    worker: str = ""
    """Whom ``release`` is for."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """An evaluator reports on a version."""

    worker: str
    version: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Checked:
    """A worker reports on a version, by data that it holds out."""

    worker: str
    version: int
    examples: int
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class CheckpointCopied:
    """Commit number ``commit`` is not durable yet, but nobody reads its snapshot's accumulator any more."""

    commit: int


@dataclass(frozen=True, slots=True)
class CheckpointWritten:
    """Commit number ``commit`` is durable."""

    commit: int


@dataclass(frozen=True, slots=True)
class CheckpointFailed:
    """Commit number ``commit`` could not be made durable."""

    commit: int
    error: str


@dataclass(frozen=True, slots=True)
class LinkUp:
    """A connection to the broker stands (again)."""

    generation: int


@dataclass(frozen=True, slots=True)
class LinkLost:
    """The connection of ``generation`` is gone, and its tokens with it."""

    generation: int


@dataclass(frozen=True, slots=True)
class Tick:
    """Time has passed."""


@dataclass(frozen=True, slots=True)
class Shut:
    """So many messages were refused unread, and not kept."""

    worker: str
    """Whose account sent them; empty for several, or if nobody vouches for any."""
    reason: Reason
    detail: str
    count: int


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Someone wants this aggregator to stop: commit what is folded, then go."""


Happening = (
    Announced
    | Arrived
    | Unreadable
    | Joined
    | Left
    | Seen
    | Ordered
    | Evaluated
    | Checked
    | CheckpointCopied
    | CheckpointWritten
    | CheckpointFailed
    | LinkUp
    | LinkLost
    | Shut
    | Tick
    | StopRequested
)
