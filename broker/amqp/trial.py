"""What an account may do on a broker: really tried, as an aggregator and as a worker do it, and nothing is left.

Declaring is tried by declaring; what was not there before is deleted again. Publishing is tried with a message whose
expiration is no number, and consuming with a priority that is none: RabbitMQ looks at permissions first and refuses
these then, so that nothing enters a queue and nothing leaves one.
"""

from __future__ import annotations

import asyncio
import functools
import secrets
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Literal

import pika

from broker.amqp.credentials import parameters
from broker.amqp.declare import RETENTION, queue_type
from broker.amqp.names import Lookups
from broker.amqp.refusals import Inequivalent, Operation, limit_of
from broker.amqp.session import Channel, Session, quiet_pika
from broker.errors import AccessRefused, BrokerError, ConnectionLost, MessageTooLarge, TopologyMismatch, Unroutable
from broker.settings import BrokerConfig
from broker.tls import days_left
from broker.topology import CONTROL, DEAD, EVENTS, UPDATES, Queue, Topology
from broker.wire.chunks import CHUNK_OVERHEAD

__all__ = ["ROLES", "Examination", "Greeting", "Role", "Tls", "Trial", "examine"]

Role = Literal["aggregator", "worker"]
ROLES: tuple[Role, ...] = ("aggregator", "worker")

#: No operation takes as long on a broker that answers, nor do all of them.
SECONDS = 10.0
ALL_SECONDS = 60.0
NO_NUMBER = "doctor"


@dataclass(frozen=True, slots=True)
class Tls:
    """An encrypted line."""

    version: str
    cipher: str
    days_left: float
    """Until the broker's certificate expires."""


@dataclass(frozen=True, slots=True)
class Greeting:
    """How one address answered."""

    address: str
    vhost: str
    user: str
    error: BrokerError | None = None
    product: str = ""
    version: tuple[int, ...] = ()
    channel_max: int = 0
    frame_max: int = 0
    heartbeat: int = 0
    seconds: float = 0.0
    """From nothing to an open connection."""
    tls: Tls | None = None


@dataclass(frozen=True, slots=True)
class Trial:
    """One operation that was tried."""

    role: Role
    what: str
    error: BrokerError | None = None
    """Why it failed: :class:`AccessRefused` for a missing permission."""

    @property
    def was_tried(self) -> bool:
        """False if what it works on is not there."""
        return not isinstance(self.error, Unroutable)


@dataclass(slots=True)
class Examination:
    """What was found. ``trials`` are of the first address that answered."""

    greetings: list[Greeting] = field(default_factory=list)
    trials: list[Trial] = field(default_factory=list)
    largest: int | None = None
    """Bytes of the largest message that fedmq would send; None if that could not be tried."""
    limit: int | None = None
    """What the broker takes, if that is less."""
    is_blocked: bool = False
    """Whether the broker takes no messages for now."""
    is_there: bool = False
    """Whether the run was there before."""
    excess: list[str] = field(default_factory=list)
    """What no worker needs and this account may do all the same; looked for if it is to be a worker's alone."""
    left: list[str] = field(default_factory=list)
    """What could not be deleted again."""


def examine(
    config: BrokerConfig, topology: Topology, worker: str, *, roles: tuple[Role, ...] = ROLES, model_bytes: int = 0
) -> Examination:
    """Connect to each address, and try at the first that answers what these ``roles`` do in this run.

    ``worker`` is the name under which a worker publishes; ``model_bytes`` the size of a version, 0 if not known.
    Raises nothing for what a broker answers.
    """
    quiet_pika()
    return asyncio.run(_examine(config, topology, worker, roles, model_bytes))


async def _examine(
    config: BrokerConfig, topology: Topology, worker: str, roles: tuple[Role, ...], model_bytes: int
) -> Examination:
    asyncio.get_running_loop().set_default_executor(Lookups())
    found = Examination()
    is_tried = False
    for params in parameters(config, f"fedmq doctor · run {topology.run}"):
        began = time.monotonic()
        try:
            session = await Session.connect(params)
        except BrokerError as error:
            vhost, user = params.virtual_host, str(params.credentials.username)
            found.greetings.append(Greeting(f"{params.host}:{params.port}", vhost, user, error))
            continue
        took = time.monotonic() - began
        channel_max, frame_max, heartbeat = session.agreed
        place = session.place
        found.greetings.append(
            Greeting(
                place.address,
                place.vhost,
                place.user,
                product=session.product,
                version=session.version,
                channel_max=channel_max,
                frame_max=frame_max,
                heartbeat=heartbeat,
                seconds=took,
                tls=_tls_of(session),
            )
        )
        try:
            if not is_tried:
                is_tried = True
                attempts = _Attempts(session, params, config, topology, found, worker=worker, model_bytes=model_bytes)
                await asyncio.wait_for(attempts.run(roles), ALL_SECONDS)
        except TimeoutError:
            found.trials.append(Trial(roles[0], "the trials", ConnectionLost(f"not over after {ALL_SECONDS:g} s")))
        except BrokerError as error:
            found.trials.append(Trial(roles[0], "the trials", error))
        finally:
            await session.close()
    return found


def _tls_of(session: Session) -> Tls | None:
    line = session.tls
    if line is None:
        return None
    certificate, cipher = line.getpeercert() or {}, line.cipher() or ("unknown",)
    return Tls(line.version() or "", cipher[0], days_left(str(certificate["notAfter"]), time.time()))


class _Attempts:
    """The trials on one connection."""

    def __init__(
        self,
        session: Session,
        params: pika.URLParameters,
        config: BrokerConfig,
        topology: Topology,
        found: Examination,
        *,
        worker: str,
        model_bytes: int,
    ) -> None:
        self._session, self._config, self._topology, self._found = session, config, topology, found
        self._worker, self._model_bytes = worker, model_bytes
        # A broker with an alarm reads nothing more of a connection that has published: all else goes over another.
        self._params = params
        self._publishing: Session | None = None
        self._nonce = secrets.token_hex(4)
        self._made: list[tuple[Literal["queue", "exchange"], str]] = []

    async def run(self, roles: tuple[Role, ...]) -> None:
        topology = self._topology
        self._found.is_there = await self._is_there(queue=topology.updates)
        try:
            if "aggregator" in roles:
                await self._as_aggregator()
            if "worker" in roles:
                await self._as_worker()
            if roles == ("worker",):
                await self._as_intruder()
            await self._try_size()
        finally:
            if self._publishing is not None:
                await self._publishing.close()
            await self._clean_up()

    # ------------------------------------------------------------------------------------------------ the roles

    async def _as_aggregator(self) -> None:
        topology = self._topology
        for exchange in topology.exchanges():
            there = await self._is_there(exchange=exchange.name)

            async def declare_exchange(channel: Channel, name: str = exchange.name, kind: str = exchange.type) -> None:
                await channel.declare_exchange(name, kind)

            declared = await self._try("aggregator", f"declare exchange {exchange.name!r}", declare_exchange)
            if declared and not there:
                self._made.append(("exchange", exchange.name))
        channel = await self._session.channel()
        kind = queue_type(channel, self._config)
        await channel.close()
        own = Queue(topology.own_queue("events", self._nonce), "classic", EVENTS, (f"{topology.run}.heartbeat.*",))
        queues = topology.queues(kind, self._model_bytes, self._config.kept_versions)
        for queue in (*queues, topology.outbox_queue(f"doctor-{self._nonce}", kind, self._model_bytes)):
            await self._queue("aggregator", queue)
        await self._queue("aggregator", own, is_own=True)
        for exchange_name, key in (
            (CONTROL, topology.turn_key),
            (EVENTS, topology.event_key("progress", "aggregator")),
            (EVENTS, topology.event_key("status", "aggregator")),
            (DEAD, topology.key("broker")),
            (topology.parameters, ""),
            (topology.chunks, ""),
        ):
            await self._publish("aggregator", exchange_name, key)
        for name in (topology.updates, topology.control, topology.turn, topology.parameters, topology.chunks):
            await self._consume("aggregator", name)

    async def _as_worker(self) -> None:
        topology, worker = self._topology, self._worker
        for exchange_name, key in (
            (UPDATES, topology.key(worker)),
            (UPDATES, topology.chunk_key(worker)),
            (CONTROL, topology.key(worker)),
            (EVENTS, topology.event_key("heartbeat", worker)),
        ):
            await self._publish("worker", exchange_name, key)
        for name in (topology.parameters, topology.chunks):
            await self._consume("worker", name)
        if await self._is_there(queue=topology.notices(worker)):  # since its first hello
            await self._consume("worker", topology.notices(worker))

    async def _as_intruder(self) -> None:
        """What would be of use to a worker gone bad. Nothing enters a queue here either, and nothing leaves one."""
        topology, other = self._topology, f"doctor-{self._nonce}"
        for what, exchange_name, key in (
            ("publish another worker's updates", UPDATES, topology.key(other)),
            ("give the aggregator commands", CONTROL, topology.command_key),
            ("speak as the aggregator", EVENTS, topology.event_key("status", "aggregator")),
            ("publish into any queue (the default exchange)", "", topology.updates),
        ):
            reason = await self._refusal(exchange_name, key)
            if reason is None and not self._found.is_blocked:
                self._found.excess.append(what)
        tried: list[tuple[str, Callable[[Channel], Awaitable[None]]]] = [
            (f"take messages from {name!r}", functools.partial(_consume_nothing, queue=name))
            for name in (topology.updates, topology.dead)
        ]

        async def declare(channel: Channel) -> None:
            # Exclusive: it goes with the connection, whatever may come in between. A name that workers once had.
            name = topology.own_queue("notice", f"{self._worker}.{self._nonce[:2]}")
            await channel.declare_own_queue(name, 1)
            await channel.delete_queue(name)

        for what, deed in (*tried, ("declare queues or exchanges", declare)):
            if await self._fails_with(deed) is None:
                self._found.excess.append(what)

    async def _try_size(self) -> None:
        """Whether a chunk fits. It is sent whole, and refused all the same."""
        largest = min(self._config.chunk_bytes + CHUNK_OVERHEAD, self._config.max_message_bytes or 2**40)
        for exchange in (EVENTS, UPDATES):
            reason = await self._refusal(exchange, self._topology.event_key("doctor", self._worker), bytes(largest))
            if self._found.is_blocked:
                return
            if isinstance(reason, MessageTooLarge):
                self._found.largest, self._found.limit = largest, limit_of(reason)
                return
            if reason is None:
                self._found.largest = largest
                return

    # ------------------------------------------------------------------------------------------------ the deeds

    async def _queue(self, role: Role, queue: Queue, *, is_own: bool = False) -> None:
        there = not is_own and await self._is_there(queue=queue.name)

        async def declare(channel: Channel) -> None:
            if is_own:
                await channel.declare_own_queue(queue.name, 10)
                return
            try:
                await channel.declare_queue(queue.name, {"x-queue-type": queue.type, **queue.arguments})
            except Inequivalent as error:
                if error.argument not in RETENTION:  # these follow from the model's size, and may differ
                    raise

        if not await self._try(role, f"declare queue {queue.name!r}", declare):
            return
        if not there:
            self._made.append(("queue", queue.name))
        for key in queue.bindings:

            async def bind(channel: Channel, key: str = key) -> None:
                await channel.bind(queue.name, queue.exchange, key)

            await self._try(role, f"bind queue {queue.name!r} to exchange {queue.exchange!r}", bind)

    async def _publish(self, role: Role, exchange: str, key: str) -> None:
        what = f"publish to exchange {exchange!r}" + (f" with key {key!r}" if key else "")
        reason = await self._refusal(exchange, key)
        if not self._found.is_blocked:
            self._found.trials.append(Trial(role, what, reason))

    async def _refusal(self, exchange: str, key: str, body: bytes = b"") -> BrokerError | None:
        """Why such a message is refused; None if for its expiration, which is looked at last."""
        if self._found.is_blocked:
            return None
        if self._publishing is None:
            self._publishing = await Session.connect(self._params)
        seconds = ALL_SECONDS / 2 if body else SECONDS
        try:
            reason = await asyncio.wait_for(self._send(self._publishing, exchange, key, body), seconds)
        except TimeoutError:
            reason = ConnectionLost(f"no answer in {seconds:g} s")
            self._found.is_blocked |= self._publishing.is_blocked
            self._publishing.cut()
            self._publishing = None
        else:
            self._found.is_blocked |= self._publishing.is_blocked
        if self._found.is_blocked:
            return None
        return None if "expiration" in str(reason) else reason

    async def _send(self, session: Session, exchange: str, key: str, body: bytes) -> BrokerError:
        """Why the broker ends the channel over such a message."""
        channel = await session.channel()
        channel.expect(Operation(f"publish to exchange {exchange!r} with key {key!r}"))
        channel.publish(exchange, key, body, pika.BasicProperties(expiration=NO_NUMBER, app_id="fedmq"))
        return await channel.ended()

    async def _consume(self, role: Role, queue: str) -> None:
        await self._try(role, f"consume from queue {queue!r}", lambda channel: _consume_nothing(channel, queue))

    async def _try(self, role: Role, what: str, deed: Callable[[Channel], Awaitable[None]]) -> bool:
        error = await self._fails_with(deed)
        self._found.trials.append(Trial(role, what, error))
        return error is None

    async def _fails_with(self, deed: Callable[[Channel], Awaitable[None]]) -> BrokerError | None:
        """Why the broker refuses this on a channel of its own; None if it does not."""
        channel = await self._session.channel()
        error: BrokerError | None = None
        try:
            await asyncio.wait_for(deed(channel), SECONDS)
        except TimeoutError:
            error = ConnectionLost(f"no answer in {SECONDS:g} s")
        except (AccessRefused, TopologyMismatch, Unroutable) as refused:
            error = refused
        except BrokerError as failed:
            if self._session.closed.done():
                raise
            error = failed
        finally:
            await channel.close()
        return error

    async def _is_there(self, *, queue: str = "", exchange: str = "") -> bool:
        try:
            await self._session.require(queues=(queue,) if queue else (), exchanges=(exchange,) if exchange else ())
        except Unroutable:
            return False
        except BrokerError:
            return True  # not ours to delete
        return True

    async def _clean_up(self) -> None:
        for kind, name in reversed(self._made):
            if self._session.closed.done():
                self._found.left.append(f"{kind} {name}")
                continue
            channel = await self._session.channel()
            operation = Operation(f"delete {kind} {name!r}", "configure")
            try:
                if kind == "exchange":
                    await channel.call("exchange_delete", operation, exchange=name, if_unused=True)
                    continue
                state = await channel.call("queue_declare", operation, queue=name, passive=True)
                if not state.method.message_count and not state.method.consumer_count:
                    await channel.delete_queue(name)
            except Unroutable:
                continue
            except BrokerError:
                # Somebody has begun to use it meanwhile.
                self._found.left.append(f"{kind} {name}")
            finally:
                await channel.close()


async def _consume_nothing(channel: Channel, queue: str) -> None:
    try:
        arguments: dict[str, str | int] = {"x-priority": NO_NUMBER}
        await channel.consume(queue, lambda *_message: None, prefetch=1, arguments=arguments)
    except ConnectionLost as error:
        if "x-priority" not in str(error):
            raise
