"""Exchanges, queues and streams of a run, as data. Nothing here talks to a broker.

Names carry the run, so that many runs share a broker and the admin UI reads like the run. Only arguments
that can never change afterwards are declared; the rest is left to the operator's policies.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from broker.errors import ConfigError
from broker.messages import NAME_PATTERN

__all__ = [
    "CONTROL",
    "DEAD",
    "EVENTS",
    "KEEP",
    "KEPT_VERSIONS",
    "UPDATES",
    "Exchange",
    "Queue",
    "QueueType",
    "Topology",
    "check_name",
]

QueueType = Literal["classic", "quorum", "stream"]

#: Topic exchange that workers publish updates to, with the key ``<run>.<worker>``. Topic, because its
#: permissions are the only ones that RabbitMQ can bind to the user's name.
UPDATES = "fedmq.updates"
#: Topic exchange for hello and goodbye, key ``<run>.<worker>``; and for what only operators and aggregators may
#: say, keys ``<run>.aggregator.command`` and ``<run>.aggregator.turn``, which no worker's permission covers.
CONTROL = "fedmq.control"
#: Topic exchange for events, key ``<run>.<kind>.<source>``. Lossy on purpose.
EVENTS = "fedmq.events"
#: Topic exchange for rejected updates, key ``<run>.<worker>``; also where the broker itself dead-letters.
DEAD = "fedmq.dead"

#: Versions in chunks that a run's stream keeps room for, if nothing else is said.
KEPT_VERSIONS = 8

#: Room in an outbox: so many updates, and so many bytes for what surrounds small ones.
OUTBOX_UPDATES = 4
OUTBOX_BYTES = 64 * 2**20

#: Notices that wait for a worker, and for how long in milliseconds: they are about now. And after how long without
#: anybody who listens their queue goes; it comes back at the worker's next hello.
MOST_NOTICES = 1000
NOTICE_LIFE = 60_000
NOTICES_EXPIRE = 600_000

#: Delivery limit of quorum queues that give up on nothing. RabbitMQ 4 drops a message without a trace at its
#: 21st return, if nothing else is said, and each look at it in the admin UI is one. Not -1, which says "no
#: limit" from 4.0 on: 3.10 accepts it and drops a message at its first return.
KEEP = 1_000_000


@dataclass(frozen=True, slots=True)
class Exchange:
    """A durable exchange."""

    name: str
    type: Literal["topic", "fanout"]


@dataclass(frozen=True, slots=True)
class Queue:
    """A durable queue and what is bound to it."""

    name: str
    type: QueueType
    exchange: str
    bindings: tuple[str, ...]
    arguments: Mapping[str, str | int | bool] = field(default_factory=dict)


def check_name(what: str, name: str) -> str:
    """``name`` itself; raises :class:`ConfigError` if it cannot be a run's or a worker's name."""
    if not re.fullmatch(NAME_PATTERN, name):
        raise ConfigError(
            f"{what} = {name!r}: a name has 1 to 64 letters, digits, '-' and '_' "
            "(it becomes part of queue names and routing keys)"
        )
    return name


@dataclass(frozen=True, slots=True)
class Topology:
    """The names of one run, and what the aggregator declares for it."""

    run: str

    def __post_init__(self) -> None:
        check_name("run", self.run)

    @property
    def updates(self) -> str:
        """Queue of updates that wait for the aggregator."""
        return f"fedmq.{self.run}.updates"

    @property
    def control(self) -> str:
        """Queue of hellos and goodbyes."""
        return f"fedmq.{self.run}.control"

    @property
    def parameters(self) -> str:
        """Fanout exchange of the versions, and the stream bound to it."""
        return f"fedmq.{self.run}.parameters"

    @property
    def chunks(self) -> str:
        """Fanout exchange of the chunks of versions that are too large for one message, and its stream."""
        return f"fedmq.{self.run}.chunks"

    @property
    def turn(self) -> str:
        """Queue whose one message says which aggregator is the active one: who holds it, unacknowledged."""
        return f"fedmq.{self.run}.turn"

    @property
    def dead(self) -> str:
        """Queue of rejected updates with their reasons."""
        return f"fedmq.{self.run}.dead"

    def outbox(self, worker: str) -> str:
        """Queue of the chunks that ``worker`` sends; the manifests that complete them are in ``updates``."""
        return f"fedmq.{self.run}.outbox.{worker}"

    def notices(self, worker: str) -> str:
        """Queue of what the aggregator tells ``worker``."""
        return f"fedmq.{self.run}.notice.{worker}"

    def chunk_key(self, worker: str) -> str:
        """Routing key of the chunks that ``worker`` sends."""
        return f"{self.run}.{worker}.chunk"

    def key(self, worker: str) -> str:
        """Routing key of what ``worker`` publishes."""
        return f"{self.run}.{worker}"

    @property
    def turn_key(self) -> str:
        """Routing key of the message that makes an aggregator the active one."""
        return f"{self.run}.aggregator.turn"

    @property
    def command_key(self) -> str:
        """Routing key of what operators ask of the aggregator."""
        return f"{self.run}.aggregator.command"

    def event_key(self, kind: str, source: str) -> str:
        """Routing key of an event."""
        return f"{self.run}.{kind}.{source}"

    def notice_key(self, worker: str) -> str:
        """Routing key of a notice to ``worker``."""
        return f"{self.run}.notice.{worker}"

    def own_queue(self, what: str, nonce: str) -> str:
        """Name of a queue that belongs to one connection and goes with it."""
        return f"fedmq.{self.run}.{what}.{nonce}"

    def exchanges(self) -> tuple[Exchange, ...]:
        """All exchanges, in the order in which to declare them."""
        return (
            Exchange(UPDATES, "topic"),
            Exchange(CONTROL, "topic"),
            Exchange(EVENTS, "topic"),
            Exchange(DEAD, "topic"),
            Exchange(self.parameters, "fanout"),
            Exchange(self.chunks, "fanout"),
        )

    def outbox_queue(self, worker: str, queue_type: Literal["classic", "quorum"], model_bytes: int) -> Queue:
        """The outbox of ``worker``: room for a few updates, so that nobody can upload without end."""
        arguments: dict[str, str | int | bool] = {
            "x-max-length-bytes": OUTBOX_UPDATES * model_bytes + OUTBOX_BYTES,
            "x-overflow": "reject-publish",
        }
        if queue_type == "quorum":
            arguments["x-delivery-limit"] = KEEP
        return Queue(self.outbox(worker), queue_type, UPDATES, (self.chunk_key(worker),), arguments)

    def notices_queue(self, worker: str) -> Queue:
        """The queue of what the aggregator tells ``worker``; it goes some time after the worker."""
        arguments: dict[str, str | int | bool] = {
            "x-max-length": MOST_NOTICES,
            "x-message-ttl": NOTICE_LIFE,
            "x-expires": NOTICES_EXPIRE,
        }
        return Queue(self.notices(worker), "classic", EVENTS, (self.notice_key(worker),), arguments)

    def queues(
        self, queue_type: Literal["classic", "quorum"], model_bytes: int, kept_versions: int = KEPT_VERSIONS
    ) -> tuple[Queue, ...]:
        """All queues of the run.

        ``model_bytes`` is the size of one version, by which the streams' retention is set: segments of about
        two versions, of which RabbitMQ always keeps the last, and a limit of about eight, or ``kept_versions`` of those
        in chunks.
        """
        updates: dict[str, str | int | bool] = {
            "x-single-active-consumer": True,
            # What the broker itself gives up on (delivery limit, expiry by policy) must not vanish.
            "x-dead-letter-exchange": DEAD,
            "x-dead-letter-routing-key": self.key("broker"),
        }
        control: dict[str, str | int | bool] = {
            # Like the updates: a standby must not take half of the hellos.
            "x-single-active-consumer": True,
        }
        turn: dict[str, str | int | bool] = {"x-single-active-consumer": True}
        dead: dict[str, str | int | bool] = {}
        if queue_type == "quorum":
            control["x-delivery-limit"] = turn["x-delivery-limit"] = dead["x-delivery-limit"] = KEEP
            # Each crash of an aggregator counts as a failed delivery of every update it held; the default
            # limit of RabbitMQ 4 (20) would bury good updates after a bad afternoon.
            updates |= {
                "x-delivery-limit": 1000,
                "x-dead-letter-strategy": "at-least-once",
                "x-overflow": "reject-publish",
            }
        # RabbitMQ takes segments of up to 3 GB.
        segment = min(max(2 * model_bytes, 1_000_000), 2_000_000_000)
        room = max(KEPT_VERSIONS * model_bytes, 4 * segment)
        retention: dict[str, str | int | bool] = {
            "x-max-length-bytes": room,
            "x-stream-max-segment-size-bytes": segment,
        }
        of_chunks = {**retention, "x-max-length-bytes": max(kept_versions * model_bytes, room)}
        return (
            Queue(self.updates, queue_type, UPDATES, (f"{self.run}.*",), updates),
            Queue(self.control, queue_type, CONTROL, (f"{self.run}.*", self.command_key), control),
            Queue(self.turn, queue_type, CONTROL, (self.turn_key,), turn),
            Queue(self.dead, queue_type, DEAD, (f"{self.run}.*",), dead),
            Queue(self.parameters, "stream", self.parameters, ("",), retention),
            Queue(self.chunks, "stream", self.chunks, ("",), of_chunks),
        )
