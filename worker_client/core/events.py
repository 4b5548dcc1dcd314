"""What a worker's machines are told (events) and what they ask for (effects)."""

from __future__ import annotations

from dataclasses import dataclass

from broker.messages import ParametersHead, Reason, UpdateId

__all__ = [
    "Abandon",
    "Abandoned",
    "BackOff",
    "BackOffOver",
    "Connected",
    "Download",
    "DownloadDue",
    "DownloadFailed",
    "DownloadLater",
    "Effect",
    "Evaluate",
    "EvaluationDone",
    "Event",
    "Exit",
    "Failed",
    "GraceOver",
    "NoticeArrived",
    "Offered",
    "ParametersArrived",
    "Publish",
    "PublishAgain",
    "PublishConfirmed",
    "PublishFailed",
    "Rest",
    "RestOver",
    "SayGoodbye",
    "SayHello",
    "StopRequested",
    "Train",
    "TrainingDone",
]


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection to the broker stands (again)."""


@dataclass(frozen=True, slots=True)
class Offered:
    """A version can be downloaded, and its model is this worker's."""

    head: ParametersHead


@dataclass(frozen=True, slots=True)
class ParametersArrived:
    """A version was received whole, and its model is this worker's."""

    head: ParametersHead


@dataclass(frozen=True, slots=True)
class DownloadFailed:
    """Of the version that ``Download`` asked for something is missing or damaged."""

    head: ParametersHead


@dataclass(frozen=True, slots=True)
class DownloadDue:
    """The time that ``DownloadLater`` asked to wait is over."""


@dataclass(frozen=True, slots=True)
class TrainingDone:
    """The training that ``Train`` asked for has an update."""


@dataclass(frozen=True, slots=True)
class EvaluationDone:
    """The evaluation that ``Evaluate`` asked for is done and told."""


@dataclass(frozen=True, slots=True)
class Abandoned:
    """Training or evaluation gave up in the middle because ``Abandon`` asked it to."""


@dataclass(frozen=True, slots=True)
class PublishConfirmed:
    """The broker has made the update durable."""


@dataclass(frozen=True, slots=True)
class PublishFailed:
    """The broker did not take the update, or its answer is unknown; publishing again may help."""

    lacks_outbox: bool = False
    """There is no outbox for its chunks: the aggregator makes it for whoever says hello."""


@dataclass(frozen=True, slots=True)
class BackOffOver:
    """The time that ``BackOff`` asked to wait is over."""


@dataclass(frozen=True, slots=True)
class RestOver:
    """The time that ``Rest`` asked to wait is over."""


@dataclass(frozen=True, slots=True)
class NoticeArrived:
    """The aggregator rejected ``update``."""

    reason: Reason
    update: UpdateId


@dataclass(frozen=True, slots=True)
class StopRequested:
    """Someone (SIGTERM, Ctrl-C, a caller) wants the worker to leave."""


@dataclass(frozen=True, slots=True)
class GraceOver:
    """The time for leaving in good order is over."""


@dataclass(frozen=True, slots=True)
class Failed:
    """Something happened that no waiting will cure: the task raised, the model differs, access is refused."""

    detail: str


Event = (
    Connected
    | Offered
    | ParametersArrived
    | DownloadFailed
    | DownloadDue
    | TrainingDone
    | EvaluationDone
    | Abandoned
    | PublishConfirmed
    | PublishFailed
    | BackOffOver
    | RestOver
    | NoticeArrived
    | StopRequested
    | GraceOver
    | Failed
)


@dataclass(frozen=True, slots=True)
class SayHello:
    """Tell the aggregator that the worker is here; ``version`` is the newest it has, -1 if none."""

    version: int


@dataclass(frozen=True, slots=True)
class Download:
    """Get the tensors of the version ``head``, the newest that was offered, in place of a download in progress."""

    head: ParametersHead


@dataclass(frozen=True, slots=True)
class DownloadLater:
    """Report ``DownloadDue`` after ``seconds``; a second one replaces the first."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Train:
    """Train from the version ``head``; ``ordinal`` counts the trainings from this version, from 0."""

    head: ParametersHead
    ordinal: int


@dataclass(frozen=True, slots=True)
class Evaluate:
    """Evaluate the version ``head`` on held-out data."""

    head: ParametersHead


@dataclass(frozen=True, slots=True)
class Abandon:
    """Give up the training or evaluation in progress at its next batch, and report ``Abandoned``."""


@dataclass(frozen=True, slots=True)
class Publish:
    """Publish the update that was trained last, under a new id; the one before is confirmed."""


@dataclass(frozen=True, slots=True)
class PublishAgain:
    """Publish the same update once more, under the same id."""


@dataclass(frozen=True, slots=True)
class BackOff:
    """Report ``BackOffOver`` after ``seconds``."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Rest:
    """Report ``RestOver`` after ``seconds``; a second one replaces the first."""

    seconds: float


@dataclass(frozen=True, slots=True)
class SayGoodbye:
    """Tell the aggregator that the worker leaves, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Exit:
    """Close everything and return. ``reason`` is ``done``, ``limit``, ``stopped``, ``diverged`` or ``failed``."""

    reason: str


Effect = (
    SayHello
    | Download
    | DownloadLater
    | Train
    | Evaluate
    | Abandon
    | Publish
    | PublishAgain
    | BackOff
    | Rest
    | SayGoodbye
    | Exit
)
