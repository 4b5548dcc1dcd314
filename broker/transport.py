"""The port: what an application needs of a broker, in the words of this domain.

Two implementations, held to the same behaviour by ``tests/contract``: ``broker.amqp`` (RabbitMQ) and
``broker.memory`` (in-process). Both carry encoded messages, never objects.

Incoming messages are handed to a *sink*, a function that must return at once (it puts them into a queue);
it is called from whatever thread the transport has. Every other method may be called from any thread.
Connections are made again for as long as it takes; the only errors that come out are those that no waiting
will cure (:class:`AccessRefused`, :class:`TopologyMismatch`, :class:`UnsupportedBroker`, :class:`MessageTooLarge`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Protocol

from broker.errors import FedmqError
from broker.messages import Reason
from broker.wire.envelope import MAX_HEADER

__all__ = [
    "HEARD",
    "AggregatorTransport",
    "Believe",
    "Connected",
    "Delivery",
    "Disconnected",
    "Failed",
    "Incoming",
    "LinkState",
    "Outgoing",
    "Sink",
    "Source",
    "Standby",
    "Token",
    "WorkerTransport",
    "largest_update",
    "order_of",
]


class Source(StrEnum):
    """Which stream of messages a delivery belongs to."""

    UPDATE = "update"
    CONTROL = "control"
    EVENT = "event"
    PARAMETERS = "parameters"


@dataclass(frozen=True, slots=True)
class Token:
    """The right to acknowledge one delivery, once, on the connection that made it."""

    generation: int
    tag: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Delivery:
    """A message that arrived. ``token`` is None where nothing has to be acknowledged.

    Updates have one, and of the control messages those that came under the operators' key.

    A message in chunks is delivered twice: its manifest, and once more when it was asked for (``fetch``).
    """

    source: Source
    body: bytes
    chunks: tuple[bytes, ...] | None = None
    """Of a message in chunks that was fetched, all that were asked for, in order."""
    lost: str = ""
    """Why some of its chunks could not be fetched; there are none then."""
    headers: Mapping[str, str | int] = field(default_factory=dict)
    user: str = ""
    """The account that sent it, for which the broker vouches; empty if it does not."""
    token: Token | None = None
    redelivered: bool = False
    left_out: int = 0
    """Bytes of a body that is larger than an update can be, of which nothing was handed over; else 0."""

    @property
    def nbytes(self) -> int:
        """Size of the body as it came."""
        return self.left_out or len(self.body)


def largest_update(model_bytes: int) -> int:
    """Bytes of a body that an update of a model of this size can have, in any code, signed or not."""
    return 2 * model_bytes + MAX_HEADER + 2**20


def order_of(headers: Mapping[str, object]) -> tuple[int, int, int]:
    """Epoch, version and attempt in a version's headers, by which the newer of two is told; 0 for what is not there."""
    epoch, version, attempt = (headers.get(name) for name in ("epoch", "version", "attempt"))
    return _number(epoch), _number(version), _number(attempt)


def _number(value: object) -> int:
    return value if isinstance(value, int) else 0


@dataclass(frozen=True, slots=True)
class Connected:
    """A connection stands (again); deliveries carry this generation from now on.

    An aggregator hears it when it is the run's active one (again).
    """

    generation: int
    newest: tuple[int, int] | None = None
    """For an aggregator that hears it for the first time: epoch and version of the newest broadcast that the
    broker holds, None if there is none."""


@dataclass(frozen=True, slots=True)
class Standby:
    """A connection stands, and another aggregator is the active one. :class:`Connected` follows when it goes."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """The connection of ``generation`` broke: its tokens are void, unacknowledged messages come again."""

    generation: int
    error: str


@dataclass(frozen=True, slots=True)
class Failed:
    """Reconnecting is pointless, for this reason; the transport has stopped."""

    error: FedmqError


@dataclass(frozen=True, slots=True)
class LinkState:
    """How a transport stands with its broker, for whoever watches."""

    connected: bool
    """Whether all of its connections stand."""
    blocked: bool
    """Whether the broker takes no messages for now: a memory or disk alarm."""
    reconnects: int
    """How often a connection was made again."""
    sent_bytes: int
    """Over all connections, as they were on the wire."""
    received_bytes: int
    dead_letters: int = 0
    """Messages that were moved to the dead letters and confirmed there."""


#: Kinds of events that reach the aggregator; the others are for people who watch.
HEARD = ("heartbeat", "evaluation", "check")

Incoming = Delivery | Connected | Standby | Disconnected | Failed
Sink = Callable[[Incoming], None]
#: Whether a delivery is to be believed; called at once, from whatever thread the transport has.
Believe = Callable[[Delivery], bool]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outgoing:
    """An encoded message on its way out.

    ``headers`` repeat small facts for people who look at the broker's admin UI; no program relies on them,
    except that the newest of several parameter messages is told by ``epoch``, ``version`` and ``attempt``.
    """

    body: bytes
    chunks: Sequence[bytes] = ()
    """Of a message in chunks, whose manifest ``body`` is; each is asked for when it is sent."""
    message_id: str = ""
    headers: Mapping[str, str | int] = field(default_factory=dict)


class AggregatorTransport(Protocol):
    """The aggregator's side: consumes updates and control, broadcasts parameters."""

    def open(self, sink: Sink, *, wait: float = 0.0, believe: Believe | None = None) -> None:
        """Start connecting, declare what the run needs, start consuming.

        Of several aggregators of one run one is active: the first, and when it goes or hangs, the next. Only the
        active one hears :class:`Connected` and is given anything.

        Returns at once; the sink is told of connections and refusals. With ``wait`` it first waits so many
        seconds for a connection, then raises :class:`BrokerUnreachable`, or what made connecting pointless.

        A version that the broker holds, and for which ``believe`` is false, is none.
        """

    def ack(self, token: Token) -> None:
        """The update is durable here: the broker may forget it. A token of an old generation is ignored."""

    def reject(self, token: Token, reason: Reason, detail: str, delivery: Delivery) -> None:
        """Move the update to the run's dead-letter queue, with the reason in its headers.

        The copy is confirmed before the original is acknowledged, so that a crash in between leaves two
        (with the same id), never none. Of an update in chunks only the manifest is kept.
        """

    def admit(self, worker: str) -> None:
        """Make what ``worker`` needs to send updates in chunks: its outbox."""

    def fetch(self, delivery: Delivery) -> None:
        """Get the chunks of the update whose manifest ``delivery`` is; it is delivered again, with them.

        Acknowledging its token then acknowledges them too. One after the other, in the order of the calls; each
        holds one update's worth of memory from this call on.
        """

    @property
    def max_message_bytes(self) -> int:
        """The largest body that this broker takes, as far as is known."""

    def shed(self, token: Token, delivery: Delivery) -> None:
        """Forget the update, and its chunks if it has some, and keep no copy: it was not even read."""

    @property
    def account(self) -> str:
        """The broker's account that it speaks as; empty before it is connected."""

    def broadcast(self, message: Outgoing) -> Future[None]:
        """Give a version to all workers, present and future. The future is done once the broker has it.

        The chunks of one ``message_id`` are sent once, however often it is broadcast.
        """

    def prepare(self, message: Outgoing) -> None:
        """Send the chunks of a version that will be broadcast, which nobody hears of before. May be left out."""

    def notify(self, worker: str, message: Outgoing) -> None:
        """Tell one worker something. Lossy."""

    def event(self, kind: str, message: Outgoing) -> None:
        """Publish an event for whoever watches. Lossy."""

    def close(self) -> None:
        """Finish what is on its way out and leave; unacknowledged updates go back to the queue."""


class WorkerTransport(Protocol):
    """A worker's side: reads parameters and notices, publishes updates."""

    def open(self, sink: Sink, *, wait: float = 0.0, believe: Believe | None = None) -> None:
        """Start connecting and reading; ``wait`` as for the aggregator.

        A version or notice for which ``believe`` is false is left aside, as if it had never come: what is newer than a
        forged version must not be told by that.

        Of the parameters at least the newest version is delivered. A run that no aggregator has declared yet is
        waited for: nothing is delivered until it exists.
        """

    def publish(self, message: Outgoing) -> Future[None]:
        """Publish an update. The future is done once the broker has made it durable.

        It fails with :class:`ConnectionLost` if the outcome is unknown, :class:`PublishRefused` or
        :class:`Unroutable` if the broker did not take it (publish again, same id), and
        :class:`MessageTooLarge` if it never will. Of chunks, those that were confirmed are not sent again.
        """

    def fetch(self, delivery: Delivery, part: range | None = None) -> None:
        """Get the chunks of the version whose manifest ``delivery`` is, or ``part`` of them; it comes again with them.

        One at a time: another call takes the place of the one before, if that is not done yet. Goes on after a
        broken connection with the chunks that are missing.
        """

    @property
    def account(self) -> str:
        """The broker's account that it speaks as; empty before it is connected."""

    @property
    def max_message_bytes(self) -> int:
        """The largest body that this broker takes, as far as is known."""

    def control(self, message: Outgoing) -> Future[None]:
        """Send a hello or goodbye to the run's aggregator, now or later."""

    def event(self, kind: str, message: Outgoing) -> None:
        """Publish an event for whoever watches. Lossy."""

    def close(self) -> None:
        """Finish what is on its way out and leave."""
