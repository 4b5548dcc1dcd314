"""What a broker answers, of whichever version and however odd, and what is made of it."""

from __future__ import annotations

from typing import Any

import pytest

from broker.topology import Topology
from fedmq.monitoring.broker import alarms_of, by_amqp, by_management
from fedmq.monitoring.facts import BrokerFacts

RUN = Topology("r")


def queue(name: str, ready: object = 0, unacked: object = 0, nbytes: object = 0) -> dict[str, Any]:
    return {
        "name": name, "messages_ready": ready, "messages_unacknowledged": unacked, "message_bytes": nbytes,
        "consumers": 1,
    }  # fmt: skip


def test_the_queues_of_the_run_and_no_others_are_told() -> None:
    queues = [queue(RUN.updates, 3, 2, 100), queue(RUN.dead, 4), queue("fedmq.r2.updates", 9), queue("mine", 9)]
    facts = by_management(RUN, queues, [], ())
    assert [(one.purpose, one.ready, one.unacked, one.nbytes) for one in facts.queues] == [
        ("updates", 3, 2, 100), ("dead letters", 4, 0, 0)
    ]  # fmt: skip
    assert (facts.dead_letters, facts.is_declared, facts.aggregators) == (4, True, ())


def test_hundreds_of_outboxes_are_one_line() -> None:
    queues = [queue(RUN.updates), *(queue(RUN.outbox(f"w{i}"), 2, 1, 10) for i in range(300))]
    line = by_management(RUN, queues, None, None).queues[-1]
    assert line.snapshot() == {
        "name": "fedmq.r.outbox.*", "purpose": "chunks of updates, 300 outboxes",
        "ready": 600, "unacked": 300, "bytes": 3000, "consumers": None,
    }  # fmt: skip


def test_who_leads_and_who_stands_by_is_told_by_their_consumers() -> None:
    consumers = [
        {"queue": {"name": RUN.turn}, "consumer_tag": "aggregator/host/1-turn", "active": False},
        {"queue": {"name": RUN.turn}, "consumer_tag": "aggregator/host/2-turn", "active": True},
        {"queue": {"name": RUN.updates}, "consumer_tag": "aggregator/host/2", "active": True},
        {"queue": {"name": "fedmq.r2.turn"}, "consumer_tag": "aggregator/host/3-turn", "active": True},
    ]
    assert by_management(RUN, [], consumers, ()).aggregators == (("host/1", False), ("host/2", True))


@pytest.mark.parametrize(
    "odd", [None, 3, "x", [], {}, {"name": None}, {"name": 3, "queue": 7}, {"queue": {"name": []}}]
)
def test_answers_of_another_form_are_passed_over(odd: object) -> None:
    facts = by_management(RUN, [odd, queue(RUN.updates, "many", -1, 1.5)], [odd], alarms_of([odd]))
    assert [(one.ready, one.unacked, one.nbytes) for one in facts.queues] == [(None, None, None)]
    assert (facts.aggregators, facts.alarms) == ((), ())


def test_alarms_say_what_the_broker_lacks() -> None:
    nodes = [
        {"name": "rabbit@a", "running": True, "mem_alarm": True, "disk_free_alarm": True, "disk_free": 12_000_000},
        {"name": "rabbit@b", "running": False, "partitions": ["rabbit@a"]},
        {"name": "rabbit@c", "running": True, "mem_alarm": False, "partitions": []},
    ]
    assert alarms_of(nodes) == (
        "rabbit@a: memory alarm: it takes no messages until some is free",
        "rabbit@a: disk alarm (12 MB are free): it takes no messages until there is room",
        "rabbit@b does not run",
        "rabbit@b: the cluster has fallen apart (network partition)",
    )


def test_amqp_alone_tells_depths_and_consumers() -> None:
    facts = by_amqp(RUN, {RUN.updates: (5, 1), RUN.dead: (2, 0), RUN.turn: (0, 2), RUN.chunks: None})
    assert [(one.purpose, one.ready, one.nbytes, one.consumers) for one in facts.queues] == [
        ("updates", 5, None, 1), ("whose turn", 0, None, 2), ("dead letters", 2, None, 0)
    ]  # fmt: skip
    assert (facts.dead_letters, facts.is_declared, facts.alarms) == (2, True, None)
    assert by_amqp(RUN, {RUN.updates: None}) == BrokerFacts(is_declared=False)
