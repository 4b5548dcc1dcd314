"""Declares a run's exchanges and queues; asking again for what is there already changes nothing."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Literal

from broker.amqp.refusals import Inequivalent
from broker.amqp.session import Channel
from broker.settings import BrokerConfig
from broker.topology import Queue, Topology

__all__ = ["bind", "declare", "declare_again", "declare_outbox", "names_of", "queue_type"]

log = logging.getLogger("fedmq.broker")

#: Before this version a quorum queue reads up to 4096 messages into memory when it is recovered.
QUORUM_SAFE = (3, 10, 11)

# They follow from the model's size, so a run that is begun anew with another model meets other values, and so does
# one for which ``fedmq broker check`` was there first, which knows no size. They say when old versions are dropped, and
# how much fits into an outbox: more than is needed serves as well.
RETENTION = {"x-max-length-bytes", "x-stream-max-segment-size-bytes"}


async def declare_again(
    channel: Channel, topology: Topology, config: BrokerConfig, model_bytes: int, *, makes_room: bool = False
) -> tuple[str, ...]:
    """As :func:`declare`, for what has been there before; ``queue NAME`` and the like for what was missing.

    That is logged, too.
    """
    exchanges, queues = names_of(topology)
    gone = await channel.session.missing(exchanges=exchanges, queues=queues)
    await declare(channel, topology, config, model_bytes, makes_room=makes_room)
    if gone:
        log.warning(
            "run %s: somebody has deleted %s; declared again%s",
            topology.run,
            ", ".join(gone),
            ". What was in a deleted queue is lost" if any(name.startswith("queue") for name in gone) else "",
        )
    return gone


def names_of(topology: Topology) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names of all exchanges and of all queues that the aggregator owns."""
    queues = topology.queues("classic", 0)
    return tuple(exchange.name for exchange in topology.exchanges()), tuple(queue.name for queue in queues)


async def bind(channel: Channel, topology: Topology) -> None:
    """Bind the run's queues once more: who deletes an exchange deletes its bindings, and somebody else may make it."""
    for queue in topology.queues("classic", 0):
        for key in queue.bindings:
            await channel.bind(queue.name, queue.exchange, key)


async def declare(
    channel: Channel, topology: Topology, config: BrokerConfig, model_bytes: int, *, makes_room: bool = False
) -> None:
    """Declare all that the aggregator owns.

    With ``makes_room`` a stream of chunks that was made for smaller versions is deleted and made anew: it would drop a
    version's first chunks before the last is written, and nobody could ever download one. What is in it is sent again
    by whoever leads. Only one of an aggregator's connections may do so, the one that writes to the stream.

    Raises :class:`TopologyMismatch` or :class:`AccessRefused`, which end the channel as well.
    """
    for exchange in topology.exchanges():
        await channel.declare_exchange(exchange.name, exchange.type)
    for queue in topology.queues(queue_type(channel, config), model_bytes, config.kept_versions):
        await _declare(channel, queue, makes_room=makes_room and queue.name == topology.chunks)
        for key in queue.bindings:
            await channel.bind(queue.name, queue.exchange, key)


def queue_type(channel: Channel, config: BrokerConfig) -> Literal["classic", "quorum"]:
    """The type of the run's queues: as configured, or what this broker does best."""
    if config.queue_type != "auto":
        return config.queue_type
    return "quorum" if channel.session.version >= QUORUM_SAFE else "classic"


async def declare_outbox(
    channel: Channel,
    topology: Topology,
    config: BrokerConfig,
    worker: str,
    model_bytes: int,
    *,
    makes_room: bool = False,
) -> None:
    """Declare what ``worker`` sends chunks to.

    With ``makes_room`` one that was made for smaller updates is made anew, if it is empty. Raises as :func:`declare`.
    """
    queue = topology.outbox_queue(worker, queue_type(channel, config), model_bytes)
    await _declare(channel, queue, makes_room=makes_room)
    for key in queue.bindings:
        await channel.bind(queue.name, queue.exchange, key)


async def _declare(channel: Channel, queue: Queue, *, makes_room: bool) -> None:
    arguments = {"x-queue-type": queue.type, **queue.arguments}
    if not RETENTION & arguments.keys():
        await channel.declare_queue(queue.name, arguments)
        return
    # RabbitMQ answers a difference by closing the channel: this one is to be kept.
    probe = await channel.session.channel()
    try:
        await probe.declare_queue(queue.name, arguments)
    except Inequivalent as error:
        if error.argument not in RETENTION:
            raise
        is_too_small = error.current is not None and error.current < int(queue.arguments[error.argument])
    else:
        return
    finally:
        await probe.close()
    if is_too_small and makes_room:
        await _make_room(channel, queue, arguments)


async def _make_room(channel: Channel, queue: Queue, arguments: Mapping[str, str | int | bool]) -> None:
    probe = await channel.session.channel()
    try:
        if queue.type != "stream" and await probe.count(queue.name):
            log.warning(
                "queue %s was made for a smaller model, and is not empty: if its worker's updates are refused, delete "
                "it; it is declared again at once",
                queue.name,
            )
            return
        await probe.delete_queue(queue.name)
        await probe.declare_queue(queue.name, arguments)
        log.info("%s was made for a smaller model; it is made anew", queue.name)
    finally:
        await probe.close()
