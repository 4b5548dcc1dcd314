"""A look at runs from outside, over AMQP alone: takes nothing away, declares nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from broker.amqp.credentials import parameters
from broker.amqp.names import Lookups
from broker.amqp.refusals import Operation
from broker.amqp.session import Session, quiet_pika
from broker.amqp.versions import newest_broadcast
from broker.errors import BrokerError, BrokerUnreachable, Unroutable
from broker.settings import BrokerConfig
from broker.topology import Topology

__all__ = ["Count", "counts", "newest_versions"]

#: Of a run whose stream is empty one second is needed to know, so several are asked at once.
AT_ONCE = 16
SECONDS = 30.0
#: Of a run that makes versions without a pause: what is newest after so many seconds is told.
PATIENCE = 3.0

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Count:
    """Of one queue or stream."""

    ready: int
    consumers: int


def newest_versions(config: BrokerConfig, runs: Sequence[str]) -> dict[str, tuple[int, int]]:
    """Epoch and version of the newest broadcast of each run that has one and lets this user read it.

    Raises :class:`BrokerError` if there is no connection.
    """

    async def look(session: Session) -> dict[str, tuple[int, int]]:
        found: dict[str, tuple[int, int]] = {}
        turns = asyncio.Semaphore(AT_ONCE)

        async def one(run: str) -> None:
            async with turns:
                channel = await session.channel()
                try:
                    newest = await newest_broadcast(channel, Topology(run).parameters, patience=PATIENCE)
                except BrokerError:
                    return  # not there any more, or not for this user
                finally:
                    await channel.close()
            if newest is not None:
                found[run] = newest

        await asyncio.wait_for(asyncio.gather(*map(one, runs)), SECONDS)
        return found

    return asyncio.run(_with_session(config, look))


def counts(config: BrokerConfig, topology: Topology) -> dict[str, Count]:
    """How much waits in the run's queues, by name; those that are not there are left out.

    Raises :class:`BrokerError` if there is no connection, or this user may not look.
    """

    async def look(session: Session) -> dict[str, Count]:
        found: dict[str, Count] = {}
        for queue in topology.queues("classic", 0):
            channel = await session.channel()
            operation = Operation(f"look at queue {queue.name!r}", "read")
            try:
                frame = await channel.call("queue_declare", operation, queue=queue.name, passive=True)
            except Unroutable:
                continue
            finally:
                await channel.close()
            found[queue.name] = Count(int(frame.method.message_count), int(frame.method.consumer_count))
        return found

    return asyncio.run(_with_session(config, look))


async def _with_session(config: BrokerConfig, look: Callable[[Session], Awaitable[T]]) -> T:
    quiet_pika()
    asyncio.get_running_loop().set_default_executor(Lookups())
    problems: list[str] = []
    for params in parameters(config, "fedmq runs"):
        try:
            session = await Session.connect(params)
        except BrokerUnreachable as error:
            problems.append(str(error))
            continue
        try:
            return await look(session)
        except TimeoutError:
            raise BrokerUnreachable(f"{session.place.address} has not answered in {SECONDS:g} s") from None
        finally:
            await session.close()
    raise BrokerUnreachable("; ".join(problems))
