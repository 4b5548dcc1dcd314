"""The dead-letter queue of a run: look at each letter, and publish it again, drop it, or leave it.

Nothing is taken out before it is safe: a letter is in hand, unacknowledged, until its copy is confirmed or it is
to be dropped. What is left goes back when the channel ends, however it ends; so does everything if this program
dies.

Letters come through a consumer, not one by one with ``basic.get``: to a quorum queue each unacknowledged get is a
consumer of its own, which takes time in the square of their number, and they come back shuffled. Measured for
20,000 letters on RabbitMQ 4.0.5: 40 s by get, 2 s by consumer.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from enum import StrEnum

import pika

from broker.amqp.credentials import parameters
from broker.amqp.publisher import Publisher
from broker.amqp.refusals import FATAL, Operation
from broker.amqp.session import Channel, Session, quiet_pika
from broker.errors import (
    BrokerError,
    BrokerUnreachable,
    ConnectionLost,
    MessageTooLarge,
    PublishRefused,
    Unroutable,
)
from broker.letters import DeadLetter, RawLetter, letter_of, replayed_headers
from broker.redaction import redacted
from broker.settings import BrokerConfig
from broker.topology import UPDATES, Topology
from broker.transport import Outgoing

__all__ = ["DeadLetterQueue", "Decide", "Looked", "Outcome", "Report", "Wish"]

#: Letters in the hands of one consumer, at least. With more than 32 consumers a quorum queue takes the letters
#: back in another order, so of a long queue each gets its share.
SHARE = 256
CONSUMERS = 30
#: What may be published and not yet confirmed. This, not the length of the queue, bounds the memory.
ON_WAY = 64
ON_WAY_BYTES = 64 * 2**20
#: How long the broker may stay silent, within what a heartbeat allows.
PATIENCE_SECONDS = 30.0
#: How often to ask whether anything is left in the queue when nothing comes. The answer may overtake a letter
#: that is on its way, so it counts only if the line has been silent since the one before.
LOOK_SECONDS = 0.25
SILENCE_BYTES = 4096
#: A quorum queue learns a moment late that a consumer has gone.
FIRST_LOOKS = 8
#: How long letters may be gone through without a look at the connection.
BREATH_SECONDS = 1.0
#: What AMQP has room for.
LARGEST_PREFETCH = 65535


class Wish(StrEnum):
    """What to do with a letter."""

    KEEP = "keep"
    REPLAY = "replay"
    DROP = "drop"


class Outcome(StrEnum):
    """What became of a letter that was not to be kept."""

    REPLAYED = "replayed"
    DROPPED = "dropped"
    RETURNED = "returned"
    """No queue is bound for it; it stays."""
    REFUSED = "refused"
    """The broker did not take it (queue full, too large), or its body was left out; it stays."""
    UNCERTAIN = "uncertain"
    """The connection broke before the confirmation; it stays, and its copy counts once."""


@dataclass(frozen=True, slots=True)
class Looked:
    """What a pass through the queue met."""

    letters: int
    others: int
    """Consumers of the queue beside this one: what they have in hand was not met."""


Decide = Callable[[DeadLetter, RawLetter], Wish]
Report = Callable[[DeadLetter, Outcome, str], None]


def _say_nothing(_letter: DeadLetter, _outcome: Outcome, _detail: str) -> None:
    """Report to nobody."""


class DeadLetterQueue:
    """The dead-letter queue of one run.

    Args:
        config: the table ``[broker]``.
        topology: the run's names.
        what: what it is opened for; the admin UI shows it as the consumer's name.
    """

    def __init__(self, config: BrokerConfig, topology: Topology, *, what: str) -> None:
        self._config = config
        self._topology = topology
        self._what = what
        self._name = f"fedmq dead {what} · run {topology.run}"
        quiet_pika()

    def work(self, decide: Decide, report: Report = _say_nothing, *, alone: bool = False) -> Looked:
        """Hand each letter to ``decide``, from the oldest on, and do what it says.

        Only the letters that waited at the beginning are met, so one that is published again and rejected again
        is not met twice. ``report`` hears what became of those that ``decide`` did not want to keep. Both are
        called on this thread and should return soon: nothing answers the broker meanwhile. No body outlives its
        call but those that are on their way, 64 MiB of them at most, or one.

        With ``alone`` it raises :class:`BrokerError` if somebody else reads the queue, who may have in hand what
        is asked for here. Raises :class:`BrokerUnreachable`, :class:`AccessRefused`, :class:`ConnectionLost`, or
        :class:`BrokerError` if the run has no dead-letter queue; what was not reported as replayed or dropped is
        in the queue still.
        """
        return asyncio.run(self._work(decide, report, alone=alone))

    async def _work(self, decide: Decide, report: Report, *, alone: bool) -> Looked:
        session = await self._connect()
        try:
            channel = await self._open(session)
            waiting, others = await self._look_first(channel)
            if others and alone:
                raise BrokerError(
                    f"somebody else reads {self._topology.dead!r} ({others} consumers): wait until that has ended and "
                    "try again (a command that was cut off counts for up to two heartbeats more)"
                )
            name = f"{self._name} · publish"
            reading = _Reading(channel, self._topology, self._config, name, decide=decide, report=report)
            try:
                await reading.run(waiting, self._what)
            finally:
                reading.close()
                await channel.close()
            return Looked(reading.seen, others)
        finally:
            await session.close()

    async def _connect(self) -> Session:
        places = parameters(self._config, self._name)
        problems = []
        for place in random.sample(places, len(places)):
            try:
                return await Session.connect(place)
            except BrokerUnreachable as error:
                problems.append(str(error))
        where = ", ".join(redacted(url) for url in self._config.urls())
        raise BrokerUnreachable(f"{'; '.join(problems)}; is RabbitMQ running there? (broker.url is {where})")

    async def _open(self, session: Session) -> Channel:
        queue, place = self._topology.dead, session.place
        try:
            await session.require(queues=(queue,))
        except Unroutable:
            raise BrokerError(
                f"{place.address} has no queue {queue!r} in virtual host {place.vhost!r}: no aggregator has declared "
                f"run {self._topology.run!r} there (another --run, another broker.url?)"
            ) from None
        return await session.channel()

    async def _look_first(self, channel: Channel) -> tuple[int, int]:
        """Letters and other consumers, once a consumer that has just ended is forgotten and has given back all."""
        for _ in range(FIRST_LOOKS):
            waiting, others = await _look(channel, self._topology.dead)
            if not others:
                break
            await asyncio.sleep(LOOK_SECONDS)
        return waiting, others


class _Reading:
    """One pass through the queue: consumes on the loop, decides, publishes on the publisher's thread."""

    def __init__(
        self, channel: Channel, topology: Topology, config: BrokerConfig, name: str, *, decide: Decide, report: Report
    ) -> None:
        self.seen = 0
        self._expected = 0
        self._topology = topology
        self._channel = channel
        self._publisher = Publisher(config, name, prepare=_nothing, failed=self._publishing_failed)
        self._publishes = False
        self._decide = decide
        self._report = report
        self._room = _Room(ON_WAY, ON_WAY_BYTES)
        self._arrived: deque[tuple[int, RawLetter]] = deque()
        self._reports: deque[tuple[DeadLetter, Outcome, str]] = deque()
        self._in_hand: set[int] = set()  # delivery tags of the present consumer
        self._on_way = 0
        self._is_refused = False
        self._loop = asyncio.get_running_loop()
        self._breathed = self._loop.time()
        self._change: asyncio.Future[None] = self._loop.create_future()

    async def run(self, waiting: int, what: str) -> None:
        """Meet ``waiting`` letters, or fewer if somebody else takes some; until all is confirmed."""
        self._expected = waiting
        share = min(max(SHARE, -(-waiting // CONSUMERS)), LARGEST_PREFETCH)
        for number in itertools.count():
            # By their tags in this order they give back what they hold.
            if self.seen >= waiting or not await self._consume(f"fedmq dead {what} {number:03d}", share):
                break
        while self._on_way or self._is_refused:
            if not await self._next_change(PATIENCE_SECONDS):
                raise _not_confirmed(self._publisher)
        self._tell()

    def close(self) -> None:
        """Publish no more."""
        self._publisher.stop()

    async def _consume(self, tag: str, share: int) -> bool:
        """Read through one consumer until it has its share in hand; False if the queue is empty."""
        self._in_hand.clear()
        queue = self._topology.dead
        await self._channel.consume(queue, self._on_message, tag=tag, prefetch=share)
        while self.seen < self._expected and len(self._in_hand) < share:
            if not self._arrived and not await self._more(queue):
                return False
            while self._arrived:
                self._meet(*self._arrived.popleft())
                await self._breathe()
            self._tell()
        await self._channel.cancel(tag)
        return True

    async def _breathe(self) -> None:
        """Now and then let the loop answer heartbeats; not each time, since it reads more letters meanwhile."""
        if self._loop.time() - self._breathed > BREATH_SECONDS:
            await asyncio.sleep(0)
            self._breathed = self._loop.time()

    async def _more(self, queue: str) -> bool:
        """Wait until something has arrived; False if nothing will."""
        heard = -SILENCE_BYTES
        for _ in range(int(PATIENCE_SECONDS / LOOK_SECONDS)):
            if await self._next_change(LOOK_SECONDS):
                return True
            left, _others = await _look(self._channel, queue)
            before, heard = heard, self._channel.session.received_bytes
            if not left and not self._arrived and heard - before < SILENCE_BYTES:
                return False
        raise BrokerUnreachable(
            f"letters wait in {queue!r}, and RabbitMQ has handed out none for {PATIENCE_SECONDS:.0f} s: try again later"
        )

    async def _next_change(self, timeout: float) -> bool:
        """Wait for a letter or a confirmation; False if none came in that time."""
        self._change = self._loop.create_future()
        if self._arrived or self._reports:
            self._change.set_result(None)
        came = await self._channel.wait(self._change, timeout)
        self._tell()
        return came

    def _on_message(self, method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
        self._in_hand.add(method.delivery_tag)
        if self.seen + len(self._arrived) >= self._expected:
            return  # came into the queue later; it goes back with the others
        raw = RawLetter(
            key=method.routing_key,
            message_id=properties.message_id or "",
            type=properties.type or "",
            headers=properties.headers or {},
            body=body,
        )
        self._arrived.append((method.delivery_tag, raw))
        self._wake()

    def _meet(self, tag: int, raw: RawLetter) -> None:
        self.seen += 1
        letter = letter_of(raw, self.seen, self._topology.run)
        wish = self._decide(letter, raw)
        if wish is Wish.DROP:
            self._acknowledge(tag)
            self._reports.append((letter, Outcome.DROPPED, ""))
        elif wish is Wish.REPLAY and letter.left_out:
            self._reports.append((letter, Outcome.REFUSED, "its body was too large to be kept: nothing to publish"))
        elif wish is Wish.REPLAY:
            self._replay(letter, raw, tag)

    def _replay(self, letter: DeadLetter, raw: RawLetter, tag: int) -> None:
        if not self._publishes:
            self._publishes = True
            self._publisher.start()
        size = len(raw.body)
        # This stops the reading, and thereby the broker: deliveries cannot be held up otherwise.
        if not self._room.enter(size, PATIENCE_SECONDS):
            raise _not_confirmed(self._publisher)
        self._on_way += 1
        copy = Outgoing(body=raw.body, message_id=raw.message_id, headers=replayed_headers(raw.headers, letter))
        key = self._topology.key(letter.worker)
        future = self._publisher.publish(UPDATES, key, copy, kind=raw.type or "update")
        future.add_done_callback(lambda done: self._confirmed(done, letter, tag, size))

    def _confirmed(self, done: Future[None], letter: DeadLetter, tag: int, size: int) -> None:
        """On the publisher's thread."""
        self._room.leave(size)
        with contextlib.suppress(RuntimeError):  # the loop is closed: this letter was given back
            self._loop.call_soon_threadsafe(self._settle, done.exception(), letter, tag)

    def _settle(self, error: BaseException | None, letter: DeadLetter, tag: int) -> None:
        self._on_way -= 1
        if error is None:
            self._acknowledge(tag)
            self._reports.append((letter, Outcome.REPLAYED, ""))
        elif isinstance(error, FATAL):
            self._is_refused = True  # the publisher's connection ends of it, and then says so
        else:
            self._reports.append((letter, _outcome_of(error), str(error)))
        self._wake()

    def _publishing_failed(self, error: BrokerError) -> None:
        """On the publisher's thread."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._channel.end, error)

    def _acknowledge(self, tag: int) -> None:
        if self._channel.raw.is_open:
            self._channel.raw.basic_ack(tag)
        self._in_hand.discard(tag)

    def _tell(self) -> None:
        while self._reports:
            self._report(*self._reports.popleft())

    def _wake(self) -> None:
        if not self._change.done():
            self._change.set_result(None)


class _Room:
    """A bound on how much is on its way, in messages and bytes. One message of any size always fits."""

    def __init__(self, messages: int, size: int) -> None:
        self._messages, self._bytes = messages, size
        self._held: list[int] = [0, 0]
        self._changed = threading.Condition()

    def enter(self, size: int, timeout: float) -> bool:
        """Wait for room, for ``timeout`` seconds at most; whether there is some."""

        def fits() -> bool:
            count, held = self._held
            return not count or (count < self._messages and held + size <= self._bytes)

        with self._changed:
            if not self._changed.wait_for(fits, timeout):
                return False
            self._held = [self._held[0] + 1, self._held[1] + size]
            return True

    def leave(self, size: int) -> None:
        """Give room back, from any thread."""
        with self._changed:
            self._held = [self._held[0] - 1, self._held[1] - size]
            self._changed.notify_all()


def _outcome_of(error: BaseException) -> Outcome:
    if isinstance(error, Unroutable):
        return Outcome.RETURNED
    if isinstance(error, PublishRefused | MessageTooLarge):
        return Outcome.REFUSED
    return Outcome.UNCERTAIN if isinstance(error, ConnectionLost) else Outcome.REFUSED


def _not_confirmed(publisher: Publisher) -> BrokerUnreachable:
    why = publisher.link.problem or "is it short of memory or disk space (an alarm in the admin UI)?"
    return BrokerUnreachable(f"RabbitMQ has confirmed nothing for {PATIENCE_SECONDS:.0f} s: {why}")


async def _look(channel: Channel, queue: str) -> tuple[int, int]:
    """How many letters are ready in ``queue``, and how many consumers it has."""
    operation = Operation(f"look at queue {queue!r}", "read")
    frame = await channel.call("queue_declare", operation, queue=queue, passive=True)
    return int(frame.method.message_count), int(frame.method.consumer_count)


async def _nothing(_channel: Channel) -> None:
    """What is published to was declared by the aggregator."""
