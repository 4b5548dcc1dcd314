"""From what a broker answers to what is known of a run; the answers may be of another version, or of no use at all."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from broker.topology import Topology
from fedmq.monitoring.facts import BrokerFacts, QueueFacts
from fedmq.monitoring.text import clean, count

__all__ = ["COLUMNS", "TURN", "alarms_of", "by_amqp", "by_management", "purposes"]

#: What is asked of a queue: with hundreds of workers, all that there is would be megabytes.
COLUMNS = ("name", "messages_ready", "messages_unacknowledged", "message_bytes", "consumers")

#: What the queue is for whose consumers are the aggregators.
TURN = "whose turn"

TAG_HEAD, TAG_TAIL = "aggregator/", "-turn"


def purposes(topology: Topology) -> dict[str, str]:
    """What each queue and stream of a run is for, by its name; outboxes, of which each worker may have one, apart."""
    return {
        topology.updates: "updates",
        topology.control: "hellos and commands",
        topology.turn: TURN,
        topology.dead: "dead letters",
        topology.parameters: "versions",
        topology.chunks: "chunks of versions",
    }


def by_amqp(topology: Topology, depths: Mapping[str, tuple[int, int] | None]) -> BrokerFacts:
    """What AMQP alone tells: messages that are ready, and consumers, by queue; None for one that is not there."""
    queues = tuple(
        QueueFacts(name, purpose, ready=depth[0], consumers=depth[1])
        for name, purpose in purposes(topology).items()
        if (depth := depths.get(name)) is not None
    )
    dead = depths.get(topology.dead)
    is_declared = depths.get(topology.updates) is not None
    return BrokerFacts(queues, dead_letters=dead[0] if dead else None, is_declared=is_declared)


def by_management(
    topology: Topology, queues: Iterable[object], consumers: Iterable[object] | None, alarms: tuple[str, ...] | None
) -> BrokerFacts:
    """What the management API tells.

    Args:
        topology: the run's names.
        queues: the virtual host's, as the API lists them.
        consumers: its consumers; None if they could not be had.
        alarms: see :func:`alarms_of`.
    """
    by_name = {str(one.get("name")): one for one in queues if isinstance(one, Mapping)}
    found = [_queue(by_name[name], name, purpose) for name, purpose in purposes(topology).items() if name in by_name]
    head = topology.outbox("")
    outboxes = [_queue(one, name, "") for name, one in by_name.items() if name.startswith(head)]
    if outboxes:
        found.append(
            QueueFacts(
                f"{head}*",
                f"chunks of updates, {len(outboxes)} outboxes",
                ready=sum(one.ready or 0 for one in outboxes),
                unacked=sum(one.unacked or 0 for one in outboxes),
                nbytes=sum(one.nbytes or 0 for one in outboxes),
            )
        )
    dead = [one.ready for one in found if one.name == topology.dead]
    return BrokerFacts(
        tuple(found),
        dead_letters=dead[0] if dead else None,
        alarms=alarms,
        aggregators=None if consumers is None else _aggregators(topology, consumers),
        is_declared=topology.updates in by_name,
    )


def alarms_of(nodes: Iterable[object]) -> tuple[str, ...]:
    """What is wrong with the nodes of a broker, as the management API lists them."""
    found = []
    for node in nodes:
        if not isinstance(node, Mapping):
            continue
        name = clean(node.get("name", "?"))
        if node.get("running") is False:
            found.append(f"{name} does not run")
        if node.get("mem_alarm"):
            found.append(f"{name}: memory alarm: it takes no messages until some is free")
        if node.get("disk_free_alarm"):
            free = count(node.get("disk_free"))
            left = "" if free is None else f" ({free / 1e6:,.0f} MB are free)"
            found.append(f"{name}: disk alarm{left}: it takes no messages until there is room")
        if node.get("partitions"):
            found.append(f"{name}: the cluster has fallen apart (network partition)")
    return tuple(found[:20])


def _queue(one: Mapping[str, Any], name: str, purpose: str) -> QueueFacts:
    return QueueFacts(
        clean(name, 200),
        purpose,
        ready=count(one.get("messages_ready")),
        unacked=count(one.get("messages_unacknowledged")),
        nbytes=count(one.get("message_bytes")),
        consumers=count(one.get("consumers")),
    )


def _aggregators(topology: Topology, consumers: Iterable[object]) -> tuple[tuple[str, bool], ...]:
    """Those that wait for their turn, or have it."""
    found = []
    for one in consumers:
        queue = one.get("queue") if isinstance(one, Mapping) else None
        if isinstance(one, Mapping) and isinstance(queue, Mapping) and queue.get("name") == topology.turn:
            tag = str(one.get("consumer_tag", "?"))
            found.append((clean(tag.removeprefix(TAG_HEAD).removesuffix(TAG_TAIL)), bool(one.get("active"))))
    return tuple(found[:20])
