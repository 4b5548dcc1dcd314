"""Quorum queues count how often a message came back, and give up on it: ours must not.

RabbitMQ 4.0 brought the limit of 20 where none is declared; before, there was none.
"""

from __future__ import annotations

import pytest

from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.topology import Topology
from tests.support.node import channel, config_of, fresh_topology, ready
from tests.support.waiting import PATIENCE, Inbox, wait_for

#: More than RabbitMQ 4's limit.
RETURNS = 30

pytestmark = pytest.mark.broker


@pytest.fixture
def topology(node: PrivateNode) -> Topology:
    """A run whose quorum queues are declared, and whose aggregator has gone."""
    topology = fresh_topology("quorum")
    end = AmqpAggregatorTransport(config_of(node, queue_type="quorum"), topology, model_bytes=1000, prefetch=4)
    end.open(Inbox(), wait=PATIENCE)
    end.close()
    return topology


@pytest.mark.parametrize("what", ["updates", "control", "dead"])
def test_what_came_back_more_often_than_rabbitmqs_own_limit_is_still_there(
    node: PrivateNode, topology: Topology, what: str
) -> None:
    queue = getattr(topology, what)
    with channel(node) as inside:
        inside.confirm_delivery()
        inside.basic_publish(f"fedmq.{what}", topology.key("w1"), b"precious", mandatory=True)
    for number in range(RETURNS):
        wait_for(lambda: ready(node, queue) == 1, what=f"the message after {number} returns")
        with channel(node) as inside:
            # RabbitMQ has no basic.get for a quorum queue with a single active consumer.
            method, _, body = next(inside.consume(queue, inactivity_timeout=PATIENCE))
            assert method is not None, f"gone after {number} returns"
            assert body == b"precious"
    wait_for(lambda: ready(node, queue) == 1, what="the message after the last return")
    if what != "dead":
        assert ready(node, topology.dead) == 0


def test_every_quorum_queue_of_a_run_declares_its_limit() -> None:
    queues = [queue for queue in Topology("run").queues("quorum", 1000) if queue.type == "quorum"]
    assert {queue.name for queue in queues} == {f"fedmq.run.{name}" for name in ("updates", "control", "turn", "dead")}
    for queue in queues:
        assert int(queue.arguments.get("x-delivery-limit", 0)) >= 1000, queue.name
