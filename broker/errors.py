"""Every error of fedmq, in one tree.

    FedmqError                      anything below; ``exit_code`` is what a command returns
    ├── ConfigError                 a setting is wrong: names the key, where it was set, what is allowed
    ├── TaskError                   the user's task cannot be imported, or raised
    ├── ModelMismatch               two descriptions of a model differ: shows where
    ├── WireError                   bytes that are not a message of ours
    │   ├── UnknownFormat           a message of a newer (or foreign) format version
    │   ├── NotSigned               a message without the signature that is asked for
    │   └── BadSignature            a message that is not as somebody who is believed has signed it
    ├── BrokerError                 RabbitMQ said no, or said nothing
    │   ├── BrokerUnreachable       no connection could be made                       (worth retrying)
    │   ├── ConnectionLost          the connection broke; what was in flight is unknown (worth retrying)
    │   ├── PublishRefused          the broker did not take a message: queue full      (worth retrying)
    │   ├── Unroutable              no queue is bound where the message was sent       (worth retrying)
    │   ├── AccessRefused           credentials, virtual host or permission
    │   ├── Untrusted               no TLS, or with a certificate that must not be trusted
    │   ├── TopologyMismatch        an exchange or queue exists with other arguments
    │   ├── UnsupportedBroker       this RabbitMQ lacks what fedmq needs
    │   └── MessageTooLarge         larger than one message may be
    ├── CheckpointError             the state folder
    │   ├── CheckpointMissing       nothing to start from
    │   ├── CheckpointCorrupt       torn, truncated, altered, or of a newer format
    │   ├── CheckpointOutdated      older than what the run has broadcast: a restored copy, another folder
    │   ├── CheckpointNotWritten    disk full, folder read-only
    │   ├── LineageError            a version cannot be rebuilt from the history and the kept updates
    │   ├── WrongRun                the folder belongs to another run
    │   └── StaleEpoch              another aggregator has taken over this run
    └── StrategyError               aggregation gave something that must not become a version
        └── StrategyBroken          a strategy or an optimiser does not what one does: its author's mistake

Errors of pika, the operating system, msgpack and pydantic are translated into these at the edge where they
arise (one table each); nothing else of theirs crosses a room's border.
"""

from __future__ import annotations

from pydantic import ValidationError

__all__ = [
    "AccessRefused",
    "BadSignature",
    "BrokerError",
    "BrokerUnreachable",
    "CheckpointCorrupt",
    "CheckpointError",
    "CheckpointMissing",
    "CheckpointNotWritten",
    "CheckpointOutdated",
    "ConfigError",
    "ConnectionLost",
    "FedmqError",
    "LineageError",
    "MessageTooLarge",
    "ModelMismatch",
    "NotSigned",
    "PublishRefused",
    "StaleEpoch",
    "StrategyBroken",
    "StrategyError",
    "TaskError",
    "TopologyMismatch",
    "UnknownFormat",
    "Unroutable",
    "UnsupportedBroker",
    "Untrusted",
    "WireError",
    "WrongRun",
    "first_problem",
]


class FedmqError(Exception):
    """Base of all errors that fedmq raises on purpose. The message says what to do about it."""

    exit_code = 1


class ConfigError(FedmqError):
    """A setting is unknown, malformed or out of range."""

    exit_code = 2


class TaskError(FedmqError):
    """The user's task could not be imported, is incomplete, or raised while it ran."""

    exit_code = 3


class ModelMismatch(FedmqError):
    """A model's tensors differ from the run's in name, shape, dtype or role."""

    exit_code = 3


class WireError(FedmqError):
    """Bytes that do not follow ``broker/wire/FORMAT.md``. The peer's fault, never a reason to stop."""


class UnknownFormat(WireError):
    """A message of a format version that this release does not know."""


class NotSigned(WireError):
    """A message without a signature, where one is asked for."""


class BadSignature(WireError):
    """A message that nobody who is believed has signed as it is: forged, changed, or of a key that is not enrolled."""


class BrokerError(FedmqError):
    """RabbitMQ refused something or could not be reached."""

    exit_code = 4
    retryable = False


class BrokerUnreachable(BrokerError):
    """No address of the broker accepted a connection."""

    retryable = True


class ConnectionLost(BrokerError):
    """The connection broke. Whether messages in flight arrived is unknown: publish them again, same id."""

    retryable = True


class PublishRefused(BrokerError):
    """The broker answered a publish with a negative confirm, as it does when a queue is full."""

    retryable = True


class Unroutable(BrokerError):
    """The broker returned a mandatory message because no queue is bound for it."""

    retryable = True


class AccessRefused(BrokerError):
    """Wrong credentials, no such virtual host, or a missing permission."""


class Untrusted(BrokerError):
    """What answers speaks no TLS, or shows a certificate that must not be trusted, or does not accept ours.

    Retried once a connection has stood: whoever comes in between must not be able to end a run.
    """


class TopologyMismatch(BrokerError):
    """An exchange or queue exists already with other properties than fedmq declares."""


class UnsupportedBroker(BrokerError):
    """The broker is too old, or lacks a feature that fedmq needs."""


class MessageTooLarge(BrokerError):
    """A message is larger than one message may be."""


class CheckpointError(FedmqError):
    """The state folder of an aggregator or a worker cannot be used."""

    exit_code = 5


class CheckpointMissing(CheckpointError):
    """There is no checkpoint to start from."""


class CheckpointCorrupt(CheckpointError):
    """A checkpoint is torn, truncated, altered, or written by a newer release."""


class CheckpointOutdated(CheckpointError):
    """The newest checkpoint here is older than what was broadcast: a restored copy, or another folder."""


class CheckpointNotWritten(CheckpointError):
    """A checkpoint could not be made durable; nothing that depends on it was acknowledged."""


class LineageError(CheckpointError):
    """A version cannot be rebuilt from the run's history and the updates that were kept, or came out otherwise."""


class WrongRun(CheckpointError):
    """The folder holds the state of another run."""


class StaleEpoch(CheckpointError):
    """The run's state has a newer owner; this aggregator has nothing to say any more."""


class StrategyError(FedmqError):
    """A strategy or an optimiser produced parameters that must not become a version."""


class StrategyBroken(StrategyError):
    """A strategy or an optimiser raised, or gave other tensors than the model's; no further round would do better."""


def first_problem(error: ValidationError) -> tuple[str, str]:
    """The first thing that pydantic complains of: where (empty if it is the whole), and what; never the value."""
    first = error.errors(include_url=False, include_input=False)[0]
    return ".".join(str(part) for part in first["loc"]), first["msg"]
