"""What workers and the aggregator say to each other, as frozen dataclasses; one class per meaning.

A message that carries tensors has two parts: a *head* of small facts, which is what the wire's header holds
and validates, and the tensors. ``broker.wire`` turns each class into bytes and back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from pydantic import Field, Strict

from broker.model import (
    DTYPES,
    Array,
    Count,
    ModelSpec,
    Pieces,
    TensorRole,
    Tensors,
    TensorSpec,
    Values,
    as_bytes,
    parameters_digest,
    pieces,
    strict,
    whole,
)

__all__ = [
    "DTYPES",
    "EVALUATION_FACTS",
    "Action",
    "Array",
    "ChunkHead",
    "Command",
    "Delta",
    "Event",
    "EventKind",
    "Goodbye",
    "Hello",
    "Manifest",
    "Mode",
    "ModelSpec",
    "Parameters",
    "ParametersHead",
    "Pieces",
    "Plan",
    "Reason",
    "Role",
    "Rounds",
    "Scalar",
    "TensorRole",
    "TensorSpec",
    "Tensors",
    "Update",
    "UpdateHead",
    "UpdateId",
    "Values",
    "Work",
    "as_bytes",
    "evaluation_metrics",
    "parameters_digest",
    "pieces",
    "whole",
]

# A name is one word of an AMQP routing key, part of queue names and of folder names, and RabbitMQ pastes a
# user's name into regular expressions: so nothing but letters, digits, dash and underscore.
NAME_PATTERN = r"^[A-Za-z0-9_-]{1,64}$"
Name = Annotated[str, Strict(), Field(pattern=NAME_PATTERN)]
Text = Annotated[str, Strict(), Field(max_length=1000)]
Number = Annotated[float, Field(strict=True)]
Label = Annotated[str, Strict(), Field(pattern=r"^[A-Za-z0-9_./:-]{1,64}$")]
Scalar = (
    Annotated[bool, Strict()] | Annotated[int, Strict()] | Annotated[float, Strict()] | Annotated[str, Strict()] | None
)
Metrics = Annotated[dict[Label, Number], Field(max_length=64)]


class Mode(StrEnum):
    """What an update's tensors are."""

    GRADIENT = "gradient"
    """The gradient of the worker's mean loss at the base version; the server descends along it."""
    DELTA = "delta"
    """New minus old parameters after local training from the base version (FedAvg, FedBuff)."""
    PARAMETERS = "parameters"
    """The parameters themselves after local training from the base version; the server moves its own towards them
    (FedAsync)."""


class Rounds(StrEnum):
    """When a round closes."""

    SYNCHRONOUS = "synchronous"
    """When every sampled worker has answered the version, or at the deadline with a minimum."""
    BUFFERED = "buffered"
    """When the buffer holds K updates, whoever sent them and whatever version they started from (FedBuff)."""


class Role(StrEnum):
    """Why a worker is connected."""

    TRAINER = "trainer"
    EVALUATOR = "evaluator"


class Reason(StrEnum):
    """Why an update was rejected. The values are what operators see in the dead-letter queue."""

    MALFORMED = "malformed"
    UNKNOWN_FORMAT = "unknown-format"
    NOT_SUPPORTED = "not-supported"
    TOO_MANY = "too-many"
    """Its account has sent more than one may, and nothing more of it is read for now."""
    TOO_LARGE = "too-large"
    """It has more bytes than any update of the run's model."""
    WRONG_RUN = "wrong-run"
    NO_USER = "no-user"
    """The broker vouches for nobody as its sender."""
    WRONG_USER = "wrong-user"
    """The account that sent it may not speak in that worker's name."""
    WRONG_MODE = "wrong-mode"
    MODEL_MISMATCH = "model-mismatch"
    INCOMPLETE = "incomplete"
    """Some of its chunks are not in the worker's outbox."""
    NOT_SIGNED = "not-signed"
    """The run takes signed updates only."""
    BAD_SIGNATURE = "bad-signature"
    """It is not as its worker has signed it, or of a key that is not enrolled."""
    NO_EXAMPLES = "no-examples"
    TOO_MANY_EXAMPLES = "too-many-examples"
    """It claims more than the run believes."""
    NOT_FINITE = "not-finite"
    NORM_TOO_LARGE = "norm-too-large"
    """Longer than the run allows."""
    NORM_UNUSUAL = "norm-unusual"
    """Many times as long as the updates that were taken last."""
    QUARANTINED = "quarantined"
    """Its worker is in quarantine for earlier updates."""
    FUTURE_VERSION = "future-version"
    ROLLED_BACK = "rolled-back"
    """It starts from a version that was taken back."""
    TOO_STALE = "too-stale"
    ROUND_CLOSED = "round-closed"
    SECOND_IN_ROUND = "second-in-round"
    WORKER_SHARE = "worker-share"
    """Its worker has as many updates in the buffer as one may have."""
    RUN_DONE = "run-done"


class Action(StrEnum):
    """What an operator can ask of a running aggregator."""

    SET = "set"
    """Other settings, from the next round on."""
    PAUSE = "pause"
    """Workers stop training; no round closes."""
    RESUME = "resume"
    STOP = "stop"
    """The run is done: with the version that the updates in the buffer make."""
    RELEASE = "release"
    """A worker's quarantine ends now."""


class EventKind(StrEnum):
    """What an event tells. Events are lossy on purpose."""

    HEARTBEAT = "heartbeat"
    PROGRESS = "progress"
    EVALUATION = "evaluation"
    CHECK = "check"
    """A worker's figures for a version, on data that it holds out."""
    NOTICE = "notice"
    STATUS = "status"
    """An aggregator's word on itself, about every second (``aggregator.status`` says what is in it)."""


# --------------------------------------------------------------------------------------------------- updates


@strict
@dataclass(frozen=True, slots=True, order=True)
class UpdateId:
    """The identity under which an update counts once, however often it is published.

    ``incarnation`` names one life of the worker's state folder; ``seq`` counts up within it and is durable
    before the first publish.
    """

    worker: Name
    incarnation: Name
    seq: Count

    def __str__(self) -> str:
        return f"{self.worker}/{self.incarnation}/{self.seq}"


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class UpdateHead:
    """The small facts of an update."""

    run: Name
    id: UpdateId
    base_version: Count
    base_epoch: Count
    mode: Mode
    examples: Count
    """Number of examples behind the update; its weight where the run weighs by examples."""
    metrics: Metrics = field(default_factory=dict)
    """What the worker measured while training: ``loss`` is the mean training loss."""
    seconds: Number = 0.0
    """How long the worker trained."""
    steps: Count = 0
    """Local steps behind a delta; 0 if the worker did not say."""
    effort: Annotated[float, Field(strict=True, ge=0, le=2**53, allow_inf_nan=False)] = 0.0
    """How much a unit gradient in every local step would have moved the parameters, in learning rates: the sum of
    the weights with which the steps' gradients went into the delta (FedNova's norm of a_i). At least 1, as the last
    step's is; 0 if the worker did not say."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Update(UpdateHead):
    """A gradient message: the head, and one tensor for each tensor of the model, in the model's dtypes.

    A parameter's tensor is what ``mode`` says; a statistic's is its value, a counter's its change
    (:class:`TensorRole`).

    Decoded tensors are read-only views of the message's bytes; of one that came in chunks, or in a codec,
    :class:`Pieces`.
    """

    model: ModelSpec
    tensors: Mapping[str, Values]
    codec: str = ""
    """In which code the large floating-point parameters travel (``broker.codecs``); empty for none."""
    seed: int = 0
    """What the codec draws from."""


# ------------------------------------------------------------------------------------------------ parameters


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """What every worker of the run does the same way between a version and its update."""

    proximal: Annotated[float, Field(strict=True, ge=0, le=1e6)] = 0.0
    """How hard each local step is pulled back to the version (FedProx's mu)."""
    momentum: Annotated[float, Field(strict=True, ge=0, lt=1)] = 0.0
    """Share of the worker's updates before in what it sends: an exponential average of its own updates."""
    evaluate_every: Count = 0
    """Workers that hold data out evaluate a version whenever so many have passed, and the last; 0 for never."""
    update_seconds: Annotated[float, Field(strict=True, ge=0, le=1e9)] = 0.0
    """The rhythm at which each worker's updates should come: it makes as many local steps as fit; 0 for as many as its
    own settings say."""
    steps_min: Annotated[int, Strict(), Field(ge=1, le=10_000_000)] = 1
    """The fewest of these."""
    steps_max: Annotated[int, Strict(), Field(ge=1, le=10_000_000)] = 10_000
    """The most."""
    personalise_steps: Annotated[int, Strict(), Field(ge=0, le=10_000_000)] = 0
    """They do that once more after so many local steps from it."""


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the aggregator asks of workers; it travels with each version."""

    mode: Mode = Mode.DELTA
    rounds: Rounds = Rounds.BUFFERED
    fraction: Number = 1.0
    """Synchronous rounds: the share of workers that train; each decides for itself, see ``is_sampled``."""
    seed: Count = 0
    attempt: Count = 0
    """Counts up whenever the same version is told again with another plan, so that the newer one is known."""
    asked: Count = 0
    """Counts up when updates for the same version are asked for again, because too few usable ones came: each worker
    may then send as many as if it had sent none."""
    answered: Annotated[tuple[Name, ...], Field(max_length=1000)] = ()
    """Synchronous rounds, where workers are asked again: those whose update is in already, or a thousand of them."""
    codec: Annotated[str, Strict(), Field(pattern=r"^[a-z0-9]{0,16}(:[0-9.]{1,16})?$")] = ""
    """In which code updates are to be sent (``broker.codecs``); empty for none."""
    updates_per_version: Count = 1
    """How many updates one worker may publish for one version before it waits for the next."""
    done: bool = False
    """This is the run's last version: workers stop."""
    paused: bool = False
    """Nobody trains until a plan comes that is not paused."""
    work: Work = field(default_factory=Work)
    """How updates are made."""

    def is_sampled(self, worker: str, version: int) -> bool:
        """Whether ``worker`` takes part in the round of ``version``: the same answer on both sides.

        A hash of (seed, version, asked, worker) read as a number in [0, 1) is compared with ``fraction``,
        so no list of workers is needed and each one is sampled independently (Bernoulli sampling).
        """
        if worker in self.answered:
            return False
        text = f"{self.seed}:{version}:{self.asked}:{worker}".encode()
        draw = int.from_bytes(hashlib.sha256(text).digest()[:8], "big") / 2**64
        return draw < self.fraction


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class ParametersHead:
    """The small facts of a version."""

    run: Name
    epoch: Count
    version: Count
    plan: Plan
    digest: Annotated[str, Strict(), Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 over the tensors of this version (``parameters_digest``)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameters(ParametersHead):
    """One durable version of the parameters. Decoded tensors, ``codec`` and ``seed`` are as an update's."""

    model: ModelSpec
    tensors: Mapping[str, Values]
    codec: str = ""
    seed: int = 0


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """How a version differs from the one before, in a codec: what whoever has that one needs."""

    base: Text
    """The ``state`` of the version before."""
    codec: Text
    seed: Count
    nbytes: Count
    chunks: tuple[tuple[Count, Text], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """A message whose tensors travel apart, as a sequence of chunks (see ``FORMAT.md``)."""

    head: UpdateHead | ParametersHead
    model: ModelSpec
    nbytes: int
    """Size in bytes of the tensor section, all chunks together."""
    chunks: tuple[tuple[int, str], ...]
    """Size in bytes and checksum of each chunk's part of the section, in order."""
    codec: str = ""
    seed: int = 0
    state: str = ""
    """Of a version that is told by deltas: what names its tensors and those of all versions before, in a chain."""
    delta: Delta | None = None
    """Its chunks follow on ``chunks``, which hold the whole version."""


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkHead:
    """Which part of which message a chunk is."""

    of: Annotated[str, Strict(), Field(pattern=r"^[A-Za-z0-9_./-]{1,220}$")]
    """The message's id, as it stands in the AMQP properties of its manifest."""
    index: Annotated[int, Strict(), Field(ge=0, lt=2**32)]
    """From 0."""


# ----------------------------------------------------------------------------------------- control and events


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A worker is here."""

    run: Name
    worker: Name
    incarnation: Name
    role: Role = Role.TRAINER
    version: Annotated[int, Strict(), Field(ge=-1, le=2**53)] = -1
    """The newest version that the worker has; -1 if none."""


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Goodbye:
    """A worker leaves on purpose."""

    run: Name
    worker: Name
    incarnation: Name
    role: Role = Role.TRAINER
    confirmed: Count = 0
    """Updates of this incarnation whose publish the broker confirmed."""
    reason: Text = ""


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """An operator asks the aggregator for something. Executed once, however often it arrives."""

    run: Name
    id: Name
    action: Action
    changes: Annotated[dict[Label, Scalar], Field(max_length=64)] = field(default_factory=dict)
    """For ``set``: settings of the table ``[aggregator]``; None takes back an earlier change. For ``release``:
    ``worker``, the name."""
    time: Number = 0.0
    """Seconds since 1970, by the sender's clock."""


@strict
@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Something worth showing: heartbeat, progress, an evaluation, a notice to a worker. May get lost."""

    run: Name
    kind: EventKind
    source: Name
    """A worker's name, or ``aggregator``."""
    time: Number
    """Seconds since 1970, by the sender's clock."""
    data: Annotated[dict[Label, Scalar], Field(max_length=64)] = field(default_factory=dict)


#: Keys of an evaluation's data that are facts about it; all others are metrics.
EVALUATION_FACTS = frozenset({"version", "epoch", "examples", "seconds"})


def evaluation_metrics(event: Event) -> dict[str, float]:
    """The metrics in an event of kind ``evaluation`` or ``check``."""
    return {
        key: float(value)
        for key, value in event.data.items()
        if key not in EVALUATION_FACTS and isinstance(value, int | float) and not isinstance(value, bool)
    }
