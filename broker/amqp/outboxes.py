"""The aggregator's end of the workers' outboxes: chunks are pulled, one update at a time.

Pulled with ``basic.get`` and not consumed, because a consumer's only brake is how much is unacknowledged, and what
is folded stays so until the next commit. Measured on loopback with chunks of 4 MiB, one get after the other is as
fast as a consumer.

An outbox may hold more than the update that is looked for: chunks that were sent twice, those of an update that was
never completed, and those of other updates whose manifests wait, or come back from a connection that broke. The first
two kinds are dropped, and they are told from the third by the order in which a worker sends: one update after the
other, chunks first. A manifest has been delivered here before every later one of its worker, unless a connection that
the broker has not given up yet still holds it; so what was begun before an update whose manifest came when there was
none such any more, and was not announced, never will be. An incarnation that was replaced gets some more time.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, replace

import pika
import pika.exceptions

from broker.amqp.refusals import Operation
from broker.amqp.search import Message, Missing, Sought, collect, drop, is_earlier, is_sibling
from broker.amqp.session import Channel
from broker.errors import BrokerError, ConnectionLost
from broker.topology import Topology
from broker.transport import Delivery, Token
from broker.wire import CHUNK_OVERHEAD

__all__ = ["Outboxes"]

log = logging.getLogger("fedmq.broker")

#: How long to look for chunks that are not there. They were confirmed before the manifest was sent, so they are; but
#: for those that an aggregator holds whose connection the broker has not yet given up.
PATIENCE = 1.0
#: The same when this aggregator has just taken over: what the one before held comes back one channel after the other.
TAKEOVER_SECONDS = 5.0
#: Between two looks, the second growing.
PAUSE, LONGEST_PAUSE = 0.25, 2.0
#: Between two times that an outbox is searched for what is to be dropped: who is refused again and again would have
#: everybody else's chunks wait for that. What is passed over goes with the next, since it is settled.
REST_SECONDS = 1.0
#: Settled updates that are remembered, so that their chunks are dropped wherever they turn up.
MOST_SETTLED = 10_000


@dataclass(frozen=True, slots=True)
class _Announced:
    """A manifest that is not acknowledged."""

    worker: str
    id: str
    at: float
    is_fresh: bool
    """It was never delivered to anybody before."""


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Chunks to get, or with ``is_waste`` to drop."""

    token: Token
    delivery: Delivery
    announced: _Announced
    is_waste: bool = False

    @property
    def count(self) -> int:
        return _natural(self.delivery.headers.get("chunks"))

    @property
    def room(self) -> int:
        return _natural(self.delivery.headers.get("bytes")) + self.count * CHUNK_OVERHEAD


class Outboxes:
    """Used on the consumer link's thread only.

    Args:
        topology: the run's names.
        patience: seconds after which the broker has certainly given up a connection that broke.
        deliver: is given each update that was fetched.
    """

    def __init__(self, topology: Topology, patience: float, deliver: Callable[[Delivery], None]) -> None:
        self._topology = topology
        self._patience = patience
        self._deliver = deliver
        self._wanted: deque[_Wanted] = deque()
        self._announced: dict[Token, _Announced] = {}
        self._held: dict[Token, tuple[Channel, list[int]]] = {}
        self._settled: OrderedDict[tuple[str, str], None] = OrderedDict()
        self._strangers: OrderedDict[tuple[str, str], float] = OrderedDict()
        """When chunks of an update of another incarnation were first seen, which nobody has announced."""
        self._resting: dict[str, _Wanted | None] = {}
        """Workers whose outboxes were searched for waste just now, and the newest that is to be dropped since."""
        self._work: asyncio.Task[None] | None = None
        self._more = asyncio.Event()
        self._begun = self._alone_from = 0.0

    def start(self, channel: Channel, *, alone: bool) -> None:
        """A new generation begins; ``alone``: nobody has ever taken anything out of the run's queues before."""
        loop = asyncio.get_running_loop()
        self._begun = loop.time()
        self._alone_from = self._begun if alone else self._begun + self._patience
        self._work = loop.create_task(self._live(channel))

    def stop(self) -> None:
        """The generation is over: the broker takes back all that is not acknowledged."""
        if self._work is not None:
            self._work.cancel()
            self._work = None
        self._wanted.clear()
        self._announced.clear()
        self._held.clear()
        self._resting.clear()

    def announce(self, token: Token, delivery: Delivery, worker: str) -> None:
        """``worker``'s manifest came. The worker by the routing key, which the broker can bind to a user's name."""
        if "chunks" in delivery.headers:
            message_id = str(delivery.headers.get("message_id", ""))
            now = asyncio.get_running_loop().time()
            self._announced[token] = _Announced(worker, message_id, now, not delivery.redelivered)

    def fetch(self, token: Token, delivery: Delivery) -> None:
        """Get the chunks of the update that ``delivery`` announces."""
        if (announced := self._announced.get(token)) is not None:
            self._put(_Wanted(token, delivery, announced))

    def discard(self, token: Token, delivery: Delivery) -> None:
        """Drop the chunks of an update that is not wanted. Those that were fetched go with :meth:`ack`."""
        if token not in self._held and (announced := self._announced.get(token)) is not None:
            self._drop(_Wanted(token, delivery, announced, is_waste=True))

    def _drop(self, wanted: _Wanted) -> None:
        worker = wanted.announced.worker
        if worker in self._resting:
            self._resting[worker] = wanted
            return
        self._resting[worker] = None
        self._put(wanted)
        asyncio.get_running_loop().call_later(REST_SECONDS, self._rested, worker)

    def _rested(self, worker: str) -> None:
        if (wanted := self._resting.pop(worker, None)) is not None:
            self._drop(wanted)

    def ack(self, token: Token) -> None:
        """The update is settled: acknowledge the chunks that were fetched for ``token``, if there are any."""
        if (announced := self._announced.pop(token, None)) is not None:
            self._settle(announced)
        channel, tags = self._held.pop(token, (None, []))
        if channel is not None and channel.raw.is_open:
            for tag in tags:
                channel.raw.basic_ack(tag)

    def _settle(self, announced: _Announced) -> None:
        self._settled[announced.worker, announced.id] = None
        if len(self._settled) > MOST_SETTLED:
            self._settled.popitem(last=False)

    def _put(self, wanted: _Wanted) -> None:
        self._wanted.append(wanted)
        self._more.set()

    async def _live(self, main: Channel) -> None:
        getter: _Getter | None = None
        try:
            while True:
                while not self._wanted:
                    self._more.clear()
                    await self._more.wait()
                wanted = self._wanted.popleft()
                deadline = self._deadline(wanted)
                pause = PAUSE
                while wanted.is_waste or wanted.token in self._announced:
                    if getter is None or not getter.channel.raw.is_open:
                        getter = _Getter(await main.session.channel())
                    if (problem := await self._serve(getter, wanted)) is None:
                        break
                    if asyncio.get_running_loop().time() > deadline:
                        self._deliver(replace(wanted.delivery, lost=problem))
                        break
                    await asyncio.sleep(pause)
                    pause = min(2 * pause, LONGEST_PAUSE)
        except ConnectionLost:
            return
        finally:
            # If only the main channel has ended, what this one holds must go back as well.
            if getter is not None and getter.channel.raw.is_open:
                getter.channel.raw.close()

    def _deadline(self, wanted: _Wanted) -> float:
        now = asyncio.get_running_loop().time()
        if self._alone_from == self._begun:
            return now + PATIENCE
        return (
            now + self._patience if wanted.delivery.redelivered else max(now, self._begun + TAKEOVER_SECONDS) + PATIENCE
        )

    async def _serve(self, getter: _Getter, wanted: _Wanted) -> str | None:
        """What is in the way, which may pass; None if nothing is. Raises :class:`ConnectionLost`."""
        announced = wanted.announced
        outbox = self._topology.outbox(announced.worker)
        sought = Sought(
            announced.id, wanted.count, wanted.room, lambda of, before: self._is_spent(of, announced, before)
        )
        try:
            end = _End(getter, outbox, announced.worker)
            if wanted.is_waste:
                await drop(end, sought)
                return None
            found = await collect(end, sought)
        except ConnectionLost:
            raise
        except Missing as missing:
            return f"{outbox}: {missing}"
        except (BrokerError, pika.exceptions.AMQPError) as error:
            # The outbox is gone, or may not be read: the channel is closed, and what it held is back.
            return None if wanted.is_waste else str(error)
        self._held[wanted.token] = getter.channel, found.tags
        chunks = tuple(found.chunks.pop(index)[1] for index in range(wanted.count))
        self._deliver(replace(wanted.delivery, chunks=chunks))
        return None

    def _is_spent(self, of: str, sought: _Announced, before: bool) -> bool:
        """See :class:`Sought`."""
        if (sought.worker, of) in self._settled:
            return True
        is_known = any((other.worker, other.id) == (sought.worker, of) for other in self._announced.values())
        if is_known or sought.at < self._alone_from:
            return False
        if is_sibling(of, sought.id):
            return is_earlier(of, sought.id)
        # Incarnations have no order but that in which their chunks stand, and what was given back may stand elsewhere.
        # And one that was replaced while it sends its last update goes on with that.
        now = asyncio.get_running_loop().time()
        seen = self._strangers.setdefault((sought.worker, of), now)
        if len(self._strangers) > MOST_SETTLED:
            self._strangers.popitem(last=False)
        return before and sought.is_fresh and now - seen >= self._patience


class _Getter:
    """One message after the other from any queue, on a channel of its own."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self.user = ""
        """The account of what came last, for which the broker vouches."""
        self._reply: asyncio.Future[Message | None] | None = None
        channel.raw.add_callback(lambda _frame: self._answer(None), [pika.spec.Basic.GetEmpty], one_shot=False)

    async def get(self, queue: str) -> Message | None:
        """The first message in ``queue``; None if it is empty. Raises the channel's end."""
        self._reply = asyncio.get_running_loop().create_future()
        self.channel.expect(Operation(f"read from queue {queue!r}", "read"))
        self.channel.raw.basic_get(queue, self._on_message)
        result: Message | None = await self.channel.reply_of(self._reply)
        return result

    def _on_message(
        self, _channel: object, method: pika.spec.Basic.GetOk, properties: pika.BasicProperties, body: bytes
    ) -> None:
        self.user = properties.user_id or ""
        self._answer((method.delivery_tag, properties.message_id or "", body))

    def _answer(self, reply: Message | None) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(reply)


@dataclass(frozen=True, slots=True)
class _End:
    """One outbox, through the getter."""

    getter: _Getter
    queue: str
    worker: str

    async def get(self) -> Message | None:
        """What others than the worker have put there is dropped; the aggregator's account may do all, and shares."""
        while (got := await self.getter.get(self.queue)) is not None:
            if self.getter.user in {self.worker, self.getter.channel.session.place.user}:
                break
            self.ack(got[0])
        return got

    def ack(self, tag: int) -> None:
        self.getter.channel.raw.basic_ack(tag)

    def give_back(self, tags: list[int]) -> None:
        if self.getter.channel.raw.is_open:
            for tag in tags:
                self.getter.channel.raw.basic_nack(tag, requeue=True)


def _natural(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
