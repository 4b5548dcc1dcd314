"""A worker's end of the stream of chunks: the chunks of one version, from where the manifest says that they stand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pika

from broker.amqp.session import Channel
from broker.amqp.upload import runs_of
from broker.errors import BrokerError, ConnectionLost
from broker.progress import bar
from broker.transport import Delivery

__all__ = ["Download"]

#: Acknowledgements of a stream are credit: so many chunks on their way keep the connection busy.
PREFETCH = 6
#: A version's chunks stand one behind the other, but for those of an aggregator that does not know yet that it was
#: superseded. So far beyond their place they are looked for.
SLACK = 500
#: RabbitMQ writes notes of its own into a stream, a few at most at the start of a segment. Where more offsets than
#: these are left out, a segment was dropped to make room, and what was in it does not come any more.
GAP = 8
#: Without a byte for so long, they are not there.
QUIET_SECONDS = 5.0
#: Less than this is a heartbeat, and no chunk on its way over a slow line.
SILENCE_BYTES = 4096


class Download:
    """One version's chunks. Goes on after a broken connection with those that are missing."""

    def __init__(self, delivery: Delivery, part: range | None, deliver: Callable[[Delivery], None]) -> None:
        """``part`` says which of the version's chunks; None is all."""
        self._delivery = delivery
        self._deliver = deliver
        headers = delivery.headers
        count = headers.get("chunks")
        self._of = str(headers.get("message_id", ""))
        self._part = part if part is not None else range(count if isinstance(count, int) else 0)
        self._runs = runs_of(headers.get("offsets", ""))
        self._chunks: dict[int, bytes] = {}
        self.is_over = False
        """Whether it was delivered, with the chunks or without."""

    async def run(self, channel: Channel, stream: str) -> None:
        """Read until all are there, and deliver. Raises the connection's end."""
        start = 0
        what = f"downloading version {self._delivery.headers.get('version', self._of)}"
        with bar(what, total=len(self._part), unit="chunks", is_deep=True) as self._bar:
            self._bar.say(len(self._chunks))
            for offset, count in self._runs:
                await self._read(channel, stream, offset, range(start, start + count))
                start += count
        self.is_over = True
        if len(self._chunks) == len(self._part):
            chunks = tuple(self._chunks.pop(index) for index in self._part)
            self._deliver(replace(self._delivery, chunks=chunks))
        else:
            problem = f"{len(self._chunks)} of {len(self._part)} chunks of {self._of} are in {stream}"
            self._deliver(replace(self._delivery, lost=problem))

    async def _read(self, main: Channel, stream: str, offset: int, wanted: range) -> None:
        """Read those of ``wanted`` that are missing; the first of them stands at ``offset`` or not far behind."""
        # Where both ranges are, and not every number of one: the headers may tell of more chunks than there can be.
        both = range(max(wanted.start, self._part.start), min(wanted.stop, self._part.stop))
        missing = {index for index in both if index not in self._chunks}
        if not missing:
            return
        channel = await main.session.channel()
        over: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        first = following = offset + min(missing) - wanted.start

        def on_chunk(method: pika.spec.Basic.Deliver, properties: pika.BasicProperties, body: bytes) -> None:
            nonlocal following
            if over.done():
                return
            of, _, text = (properties.message_id or "").rpartition("#")
            index = int(text) if text.isdecimal() else -1
            if of == self._of and index in missing:
                missing.discard(index)
                self._chunks[index] = body
                self._bar.say(len(self._chunks))
            here = (properties.headers or {}).get("x-stream-offset", following)
            is_gap, following = here > following + GAP, max(here + 1, following)
            if not missing or is_gap or here > first + len(wanted) + SLACK:
                over.set_result(None)
            else:
                channel.raw.basic_ack(method.delivery_tag)

        try:
            arguments: dict[str, str | int] = {"x-stream-offset": first}
            await channel.consume(stream, on_chunk, prefetch=PREFETCH, arguments=arguments)
            heard = -SILENCE_BYTES
            while not over.done() and channel.session.received_bytes - heard >= SILENCE_BYTES:
                heard = channel.session.received_bytes
                await channel.wait(over, QUIET_SECONDS)
        except ConnectionLost:
            raise
        except BrokerError:
            return  # the stream is gone; whoever declares it again sends the version again
        finally:
            await channel.close()
