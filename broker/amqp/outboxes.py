"""The aggregator's end of the workers' outboxes: chunks are pulled, one update at a time.

Pulled with ``basic.get`` and not consumed, because a consumer's only brake is how much is unacknowledged, and what
is folded stays so until the next commit. Measured on loopback with chunks of 4 MiB, one get after the other is as
fast as a consumer.

An outbox may hold more than the update that is looked for: chunks that were sent twice, or of an update that was
never completed. Whatever comes before the update's own chunks, and is not part of it, is of no use to anybody.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import pika
import pika.exceptions

from broker.amqp.refusals import Operation
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
PAUSE = 0.25


@dataclass(frozen=True, slots=True)
class _Wanted:
    """Chunks to get, or with ``is_waste`` to drop."""

    token: Token
    delivery: Delivery
    worker: str
    is_waste: bool = False

    @property
    def id(self) -> str:
        return str(self.delivery.headers.get("message_id", ""))

    @property
    def count(self) -> int:
        return _natural(self.delivery.headers.get("chunks"))

    @property
    def room(self) -> int:
        return _natural(self.delivery.headers.get("bytes")) + self.count * CHUNK_OVERHEAD


@dataclass(slots=True)
class _Found:
    chunks: dict[int, tuple[int, bytes]] = field(default_factory=dict)
    """Delivery tag and body, by index."""

    @property
    def tags(self) -> list[int]:
        return [tag for tag, _ in self.chunks.values()]

    @property
    def nbytes(self) -> int:
        return sum(len(body) for _, body in self.chunks.values())


class _Missing(Exception):
    """The chunks that are looked for are not there."""


class Outboxes:
    """Used on the consumer link's thread only.

    Args:
        topology: the run's names.
        patience: seconds to look for the chunks of an update that was delivered before.
        deliver: is given each update that was fetched.
    """

    def __init__(self, topology: Topology, patience: float, deliver: Callable[[Delivery], None]) -> None:
        self._topology = topology
        self._patience = patience
        self._deliver = deliver
        self._wanted: deque[_Wanted] = deque()
        self._held: dict[Token, tuple[Channel, list[int]]] = {}
        self._work: asyncio.Task[None] | None = None
        self._more = asyncio.Event()

    def start(self, channel: Channel) -> None:
        """A new generation begins."""
        self._work = asyncio.get_running_loop().create_task(self._live(channel))

    def stop(self) -> None:
        """The generation is over: the broker takes back all that is not acknowledged."""
        if self._work is not None:
            self._work.cancel()
            self._work = None
        self._wanted.clear()
        self._held.clear()

    def fetch(self, token: Token, delivery: Delivery, worker: str) -> None:
        """Get the chunks of the update that ``delivery`` announces."""
        self._put(_Wanted(token, delivery, worker))

    def discard(self, token: Token, delivery: Delivery, worker: str) -> None:
        """Drop the chunks of an update that is not wanted."""
        self._put(_Wanted(token, delivery, worker, is_waste=True))

    def ack(self, token: Token) -> None:
        """Acknowledge the chunks that were fetched for ``token``, if there are any."""
        channel, tags = self._held.pop(token, (None, []))
        if channel is not None and channel.raw.is_open:
            for tag in tags:
                channel.raw.basic_ack(tag)

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
                if getter is None or not getter.channel.raw.is_open:
                    getter = _Getter(await main.session.channel())
                await self._serve(getter, self._wanted.popleft())
        except ConnectionLost:
            return
        finally:
            # If only the main channel has ended, what this one holds must go back as well.
            if getter is not None and getter.channel.raw.is_open:
                getter.channel.raw.close()

    async def _serve(self, getter: _Getter, wanted: _Wanted) -> None:
        try:
            await (self._drop(getter, wanted) if wanted.is_waste else self._fetch(getter, wanted))
        except ConnectionLost:
            raise
        except (BrokerError, pika.exceptions.AMQPError) as error:
            # The outbox is gone, or may not be read: the channel is closed, and what it held is back.
            self._lose(wanted, str(error))

    async def _fetch(self, getter: _Getter, wanted: _Wanted) -> None:
        patience = self._patience if wanted.delivery.redelivered else PATIENCE
        deadline = asyncio.get_running_loop().time() + patience
        while True:
            found = _Found()
            try:
                await self._collect(getter, wanted, found)
            except _Missing as missing:
                getter.give_back(found.tags)
                if asyncio.get_running_loop().time() > deadline:
                    self._lose(wanted, str(missing))
                    return
                found.chunks.clear()
                await asyncio.sleep(PAUSE)
            else:
                self._held[wanted.token] = getter.channel, found.tags
                chunks = tuple(found.chunks.pop(index)[1] for index in range(wanted.count))
                self._deliver(replace(wanted.delivery, chunks=chunks))
                return

    def _lose(self, wanted: _Wanted, problem: str) -> None:
        if not wanted.is_waste:
            self._deliver(replace(wanted.delivery, lost=problem))

    async def _collect(self, getter: _Getter, wanted: _Wanted, found: _Found) -> None:
        """Get all chunks of ``wanted``. Raises :class:`_Missing`."""
        queue = self._topology.outbox(wanted.worker)
        while len(found.chunks) < wanted.count:
            got = await getter.get(queue)
            missing = f"{len(found.chunks)} of {wanted.count} chunks are in {queue}"
            if got is None:
                raise _Missing(missing)
            tag, message_id, body = got
            of, _, index = message_id.rpartition("#")
            if of == wanted.id and index.isdecimal() and int(index) < wanted.count:
                if int(index) in found.chunks:  # the later one stands: the update may have been cut anew
                    getter.channel.raw.basic_ack(found.chunks[int(index)][0])
                found.chunks[int(index)] = tag, body
                if found.nbytes > wanted.room:
                    raise _Missing(f"its chunks in {queue} are larger than the {wanted.room} bytes that it announces")
            elif _is_later(of, wanted.id):
                getter.give_back([tag])
                raise _Missing(missing)
            else:
                getter.channel.raw.basic_ack(tag)

    async def _drop(self, getter: _Getter, wanted: _Wanted) -> None:
        """Take what there is of ``wanted``, and what was left before it."""
        rest = wanted.count
        while rest > 0 and (got := await getter.get(self._topology.outbox(wanted.worker))) is not None:
            tag, message_id, _ = got
            of = message_id.rpartition("#")[0]
            if _is_later(of, wanted.id):
                getter.give_back([tag])
                return
            getter.channel.raw.basic_ack(tag)
            rest -= of == wanted.id


class _Getter:
    """One message after the other from any queue, on a channel of its own."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._reply: asyncio.Future[tuple[int, str, bytes] | None] | None = None
        channel.raw.add_callback(lambda _frame: self._answer(None), [pika.spec.Basic.GetEmpty], one_shot=False)

    async def get(self, queue: str) -> tuple[int, str, bytes] | None:
        """Delivery tag, ``message_id`` and body of the first message in ``queue``; None if it is empty.

        Raises the channel's end.
        """
        self._reply = asyncio.get_running_loop().create_future()
        self.channel.expect(Operation(f"read from queue {queue!r}", "read"))
        self.channel.raw.basic_get(queue, self._on_message)
        result: tuple[int, str, bytes] | None = await self.channel.reply_of(self._reply)
        return result

    def give_back(self, tags: list[int]) -> None:
        """Put messages back where they were."""
        if self.channel.raw.is_open:
            for tag in tags:
                self.channel.raw.basic_nack(tag, requeue=True)

    def _on_message(
        self, _channel: object, method: pika.spec.Basic.GetOk, properties: pika.BasicProperties, body: bytes
    ) -> None:
        self._answer((method.delivery_tag, properties.message_id or "", body))

    def _answer(self, reply: tuple[int, str, bytes] | None) -> None:
        if self._reply is not None and not self._reply.done():
            self._reply.set_result(reply)


def _is_later(of: str, than: str) -> bool:
    """Whether ``of`` is an update of the same incarnation as ``than``, and a later one."""
    mine, _, seq = of.rpartition("/")
    other, _, limit = than.rpartition("/")
    return mine == other and seq.isdecimal() and limit.isdecimal() and int(seq) > int(limit)


def _natural(value: object) -> int:
    return value if isinstance(value, int) and value > 0 else 0
