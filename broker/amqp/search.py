"""How one update's chunks are found in an outbox, where others may stand before, among and behind them.

What is another update's is set aside, and given back in the end: its manifest may be waiting, or be on its way back
from a connection that broke. Only what certainly nobody will ask for is dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["Found", "Message", "Missing", "OutboxEnd", "Sought", "collect", "drop", "is_earlier", "is_sibling"]

#: Chunks of later updates that are passed over. RabbitMQ puts what is given back where it was, or nearer to the head,
#: so there are none, but in a quorum queue, which puts it behind what was given back before.
LOOK_PAST = 16

#: Delivery tag, ``message_id`` and body.
Message = tuple[int, str, bytes]


class OutboxEnd(Protocol):
    """One outbox, from which messages are taken one after the other."""

    async def get(self) -> Message | None:
        """The first message; None if there is none. Raises the channel's end."""

    def ack(self, tag: int) -> None:
        """The broker may forget it."""

    def give_back(self, tags: list[int]) -> None:
        """Put these back where they were."""


class Missing(Exception):
    """The chunks that are looked for are not there, or are not what was announced."""


@dataclass(frozen=True, slots=True)
class Sought:
    """The update whose chunks are looked for."""

    id: str
    count: int
    room: int
    """The most bytes that its chunks may have."""
    is_spent: Callable[[str, bool], bool]
    """Whether chunks of the update with this id are of no use to anybody; the second argument tells whether they stand
    before everything that was found of the update that is looked for."""


@dataclass(slots=True)
class Found:
    """Delivery tag and body of each chunk, by index."""

    chunks: dict[int, tuple[int, bytes]] = field(default_factory=dict)

    @property
    def tags(self) -> list[int]:
        """Delivery tags."""
        return [tag for tag, _ in self.chunks.values()]

    @property
    def nbytes(self) -> int:
        """Size in bytes of all of them."""
        return sum(len(body) for _, body in self.chunks.values())


async def collect(outbox: OutboxEnd, sought: Sought) -> Found:
    """All chunks of ``sought``.

    Raises :class:`Missing`, and the channel's end; nothing is in hand then.
    """
    found, aside, later = Found(), list[int](), 0
    try:
        while len(found.chunks) < sought.count:
            got = await outbox.get() if later < LOOK_PAST else None
            if got is None:
                raise Missing(f"{len(found.chunks)} of {sought.count} chunks are there")
            tag, message_id, body = got
            of, _, index = message_id.rpartition("#")
            if of == sought.id and index.isdecimal() and int(index) < sought.count:
                if int(index) in found.chunks:  # the later one stands: the update may have been cut anew
                    outbox.ack(found.chunks[int(index)][0])
                found.chunks[int(index)] = tag, body
                if found.nbytes > sought.room:
                    raise Missing(f"its chunks are larger than the {sought.room} bytes that it announces")
            elif of in {sought.id, ""} or sought.is_spent(of, not found.chunks):
                outbox.ack(tag)
            else:
                aside.append(tag)
                later += is_earlier(sought.id, of)
    except Missing:
        aside = sorted([*aside, *found.tags])
        raise
    finally:
        outbox.give_back(aside)
    return found


async def drop(outbox: OutboxEnd, sought: Sought) -> None:
    """Take away what there is of ``sought``, and what is spent before it. Raises the channel's end."""
    aside: list[int] = []
    rest = sought.count
    try:
        while rest > 0 and (got := await outbox.get()) is not None:
            tag, message_id, _ = got
            of = message_id.rpartition("#")[0]
            if of in {sought.id, ""} or sought.is_spent(of, rest == sought.count):
                outbox.ack(tag)
                rest -= of == sought.id
                continue
            aside.append(tag)
            if is_earlier(sought.id, of):
                return
    finally:
        outbox.give_back(aside)


def is_sibling(of: str, other: str) -> bool:
    """Whether both are updates of one incarnation."""
    return of.rpartition("/")[0] == other.rpartition("/")[0]


def is_earlier(of: str, than: str) -> bool:
    """Whether ``of`` is an update of the same incarnation as ``than``, and an earlier one."""
    seq, limit = of.rpartition("/")[2], than.rpartition("/")[2]
    return is_sibling(of, than) and seq.isdecimal() and limit.isdecimal() and int(seq) < int(limit)
