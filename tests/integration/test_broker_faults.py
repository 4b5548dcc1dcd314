"""What a broker and its operator do to a run in mid-flight, at both transports. Nothing confirmed is lost."""

from __future__ import annotations

import logging
import secrets
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pika.exceptions
import pytest

from broker.amqp.node import PrivateNode
from broker.amqp.session import Channel
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.errors import BrokerUnreachable, ConnectionLost, PublishRefused
from broker.messages import Reason
from broker.settings import BrokerConfig
from broker.topology import DEAD, Topology
from broker.transport import Outgoing, Source
from tests.support.ends import Ends, confirmed, version
from tests.support.node import admin_of, channel, config_of, fresh_topology, ready
from tests.support.proxy import Proxy
from tests.support.waiting import Inbox, wait_for

pytestmark = pytest.mark.broker

#: What depends on the broker's own pace: its checks, its alarms, its restarts.
LONG = 90.0


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


@pytest.fixture
def topology() -> Topology:
    return fresh_topology("faults")


def update(number: int) -> Outgoing:
    return Outgoing(body=f"u{number}".encode(), message_id=f"w1/i/{number}")


def ids(inbox: Inbox) -> list[str]:
    return [str(delivery.headers["message_id"]) for delivery in inbox.deliveries()]


@contextmanager
def policy(node: PrivateNode, pattern: str, **definition: object) -> Iterator[None]:
    """A policy for the queues that ``pattern`` names, as an operator sets it."""
    admin, name = admin_of(node), f"policy-{secrets.token_hex(3)}"
    path = f"/policies/%2F/{name}"
    admin.put(path, {"pattern": pattern, "definition": definition, "apply-to": "queues"})
    try:
        yield
    finally:
        admin._request("DELETE", path)


def unacknowledged(node: PrivateNode, queue: str) -> int:
    """How many messages of ``queue`` are in somebody's hands."""
    lines = node.ctl("list_queues", "--no-table-headers", "name", "messages_unacknowledged").splitlines()
    return next(int(line.split()[1]) for line in lines if line.split()[0] == queue)


# ----------------------------------------------------------------------------------------------- full queues


def test_a_full_queue_refuses_an_update_which_is_taken_later_under_its_id(
    node: PrivateNode, ends: Ends, topology: Topology
) -> None:
    # Given a queue that takes two updates, and nobody who empties it
    aggregator, _ = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    aggregator.close()
    limit = {"max-length": 2, "overflow": "reject-publish"}
    with policy(node, f"^{topology.updates}$", **limit):
        # When more come
        refused = wait_for(
            lambda: next((e for n in range(9) if (e := worker.publish(update(n)).exception(LONG))), None),
            LONG,
            what="a refusal",
        )
        assert isinstance(refused, PublishRefused)
        assert refused.retryable
        assert ready(node, topology.updates) >= 2

        # Then whoever empties it is given the rest, too
        _, inbox = ends.aggregator(config_of(node), topology)
        confirmed(worker.publish, update(100))
        inbox.wait(lambda: ids(inbox)[-1:] == ["w1/i/100"], LONG)
    assert ids(inbox).count("w1/i/100") == 1


def test_a_rejected_update_waits_for_room_in_the_dead_letters(
    node: PrivateNode, ends: Ends, topology: Topology, caplog: pytest.LogCaptureFixture
) -> None:
    aggregator, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, update(0))
    delivery = inbox.wait_delivery()
    assert delivery.token is not None
    with policy(node, f"^{topology.dead}$", **{"max-length": 0, "overflow": "reject-publish"}):
        with caplog.at_level(logging.WARNING):
            wait_for(lambda: _is_full(node, topology), LONG, what="the policy in force")
            aggregator.reject(delivery.token, Reason.TOO_STALE, "late", delivery)
            wait_for(lambda: caplog.text.count("not yet in the dead letters"), what="a warning")
        assert unacknowledged(node, topology.updates) == 1

    wait_for(lambda: ready(node, topology.dead) == 1, LONG, what="a dead letter")
    wait_for(lambda: unacknowledged(node, topology.updates) == 0, LONG, what="the acknowledgement")


def _is_full(node: PrivateNode, topology: Topology) -> bool:
    """Whether the dead letters take no more; what they take while asked is taken out."""
    with channel(node) as inside:
        inside.confirm_delivery()
        try:
            inside.basic_publish(DEAD, topology.key("w9"), b"probe", mandatory=True)
        except pika.exceptions.NackError:
            return True
        inside.queue_purge(topology.dead)
        return False


# ---------------------------------------------------------------------------------------------------- alarms

ALARMS = {
    "memory": (("set_vm_memory_high_watermark", "absolute", "1"), ("set_vm_memory_high_watermark", "0.4")),
    "disk": (("set_disk_free_limit", "999999GB"), ("set_disk_free_limit", "200MB")),
}


@contextmanager
def alarm(node: PrivateNode, kind: str) -> Iterator[None]:
    on, off = ALARMS[kind]
    node.ctl(*on)
    try:
        yield
    finally:
        node.ctl(*off)


def wait_blocked(worker: AmqpWorkerTransport) -> None:
    """Send until the broker says that it takes nothing; from then on it has read nothing."""

    def blocked() -> bool:
        worker.event("progress", Outgoing(body=b"something"))
        inside = worker._publisher._channel
        return inside is not None and inside.session.is_blocked

    wait_for(blocked, LONG, what="the broker's word")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ALARMS)
def test_in_an_alarm_publishing_waits_and_acknowledging_goes_on(
    kind: str, node: PrivateNode, ends: Ends, topology: Topology, caplog: pytest.LogCaptureFixture
) -> None:
    # Given two updates in the aggregator's hands
    aggregator, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    for number in (0, 1):
        confirmed(worker.publish, update(number))
    tokens = [inbox.wait_delivery(number).token for number in (1, 2)]

    # When the broker takes no more messages
    with caplog.at_level(logging.WARNING), alarm(node, kind):
        wait_blocked(worker)
        assert "takes no messages for now" in caplog.text
        waiting = worker.publish(update(2))
        # Then what is acknowledged is acknowledged all the same
        for token in tokens:
            assert token is not None
            aggregator.ack(token)
        wait_for(lambda: unacknowledged(node, topology.updates) == 0, LONG, what="acknowledgements")
        assert not waiting.done()
    waiting.result(LONG)
    assert inbox.wait_delivery(3, timeout=LONG).body == b"u2"
    assert inbox.losses() == []


@pytest.mark.slow
def test_an_alarm_longer_than_the_patience_with_it_costs_connections_and_nothing_else(
    node: PrivateNode, ends: Ends, topology: Topology
) -> None:
    config = config_of(node, blocked_timeout=1.0)
    aggregator, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config, topology)
    confirmed(worker.publish, update(0))
    with alarm(node, "memory"):
        wait_blocked(worker)
        # When the connection is given up, more than once
        for _ in range(2):
            assert isinstance(worker.publish(update(1)).exception(LONG), ConnectionLost)
        last = worker.publish(update(1))
        newer = aggregator.broadcast(version(1))
    if last.exception(LONG) is not None:
        confirmed(worker.publish, update(1))

    # Then the update arrives; under its id, so it does not matter how often
    newer.result(LONG)
    inbox.wait(lambda: set(ids(inbox)) == {"w1/i/0", "w1/i/1"}, LONG)


@pytest.mark.slow
def test_who_leaves_in_an_alarm_is_not_kept(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    aggregator, _ = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, update(0))
    with alarm(node, "memory"):
        wait_blocked(worker)
        waiting = worker.publish(update(1))
        worker.close()
        aggregator.close()
    assert waiting.exception(LONG) is not None


# ------------------------------------------------------------------------------------- channels, connections


def _on_consumer(end: AmqpAggregatorTransport, deed: Callable[[Channel], Any]) -> None:
    """Do something wrong on the aggregator's channel, so that the broker closes it."""
    inside = end._channel
    assert inside is not None
    end._consumer.call(deed, inside)


def test_a_channel_that_the_broker_closes_is_opened_again(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    aggregator, inbox = ends.aggregator(config_of(node), topology)
    worker, _ = ends.worker(config_of(node), topology)
    confirmed(worker.publish, update(0))
    inbox.wait_delivery()

    _on_consumer(aggregator, lambda inside: inside.raw.basic_ack(4711))

    inbox.wait(lambda: len(inbox.connections()) == 2, LONG)
    assert "unknown delivery tag" in inbox.losses()[0].error
    again = inbox.wait_delivery(2, timeout=LONG)
    assert (again.body, again.redelivered) == (b"u0", True)
    assert inbox.failures() == []


def test_a_consumer_that_is_ended_begins_again(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    """As the broker ends it when a queue's leader moves, or from 4.3 on when an acknowledgement takes too long."""
    aggregator, inbox = ends.aggregator(config_of(node), topology)
    worker, parameters = ends.worker(config_of(node), topology)
    confirmed(worker.publish, update(0))
    inbox.wait_delivery()
    aggregator.broadcast(version(1)).result(LONG)
    parameters.wait_delivery(1, Source.PARAMETERS)

    with channel(node) as inside:
        inside.queue_delete(topology.parameters)

    inbox.wait(lambda: len(inbox.connections()) == 2, LONG)
    aggregator.broadcast(version(2)).result(LONG)
    assert parameters.wait_delivery(2, Source.PARAMETERS, LONG).body == b"v2"


def test_all_connections_closed_at_once_come_back(node: PrivateNode, ends: Ends, topology: Topology) -> None:
    _, inbox = ends.aggregator(config_of(node), topology)
    worker, parameters = ends.worker(config_of(node), topology)
    confirmed(worker.publish, update(0))

    node.ctl("close_all_connections", "maintenance")

    inbox.wait(lambda: len(inbox.connections()) == 2, LONG)
    parameters.wait(lambda: len(parameters.connections()) == 2, LONG)
    assert "maintenance" in inbox.losses()[0].error
    confirmed(worker.publish, update(1))
    inbox.wait(lambda: set(ids(inbox)) == {"w1/i/0", "w1/i/1"}, LONG)


# -------------------------------------------------------------------------------------------------- addresses


def test_of_three_addresses_one_is_dead_from_the_start_and_the_second_dies(
    node: PrivateNode, ends: Ends, topology: Topology
) -> None:
    with Proxy.to(node.url) as first, Proxy.to(node.url) as second:
        second.refuse()
        url = f"amqp://u:p@127.0.0.1:1/,{first.url(node.url)},{second.url(node.url)}"
        _, inbox = ends.aggregator(config_of(node), topology)
        worker, _ = ends.worker(config_of(node, url=url), topology)
        confirmed(worker.publish, update(0))
        assert (first.connections, second.connections) == (2, 0)

        second.heal()
        first.refuse()
        first.cut()

        confirmed(worker.publish, update(1))
        wait_for(lambda: second.connections == 2, LONG, what="both connections over the other address")
        inbox.wait(lambda: set(ids(inbox)) == {"w1/i/0", "w1/i/1"}, LONG)
        worker.close()


def test_a_name_that_leads_elsewhere_is_followed(
    node: PrivateNode, ends: Ends, topology: Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = socket.getaddrinfo
    with Proxy.to(node.url) as old, Proxy.to(node.url) as new:
        ports = {"now": old.port}

        def resolve(host: Any, port: Any, *rest: Any, **more: Any) -> Any:
            if host == "broker.example":
                return real("127.0.0.1", ports["now"], *rest, **more)
            return real(host, port, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", resolve)
        user = node.url.partition("@")[0]
        _, inbox = ends.aggregator(config_of(node), topology)
        worker, _ = ends.worker(config_of(node, url=f"{user}@broker.example:5672/"), topology)
        confirmed(worker.publish, update(0))

        # When the broker moves
        ports["now"] = new.port
        old.refuse()
        old.cut()

        # Then the worker goes after it
        confirmed(worker.publish, update(1))
        wait_for(lambda: new.connections == 2, LONG, what="both connections to the new address")
        inbox.wait(lambda: set(ids(inbox)) == {"w1/i/0", "w1/i/1"}, LONG)
        worker.close()


def test_a_name_server_that_is_silent_keeps_nobody(topology: Topology, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, answer = threading.Event(), threading.Event()

    def silent(*_: Any, **__: Any) -> Any:
        asked.set()
        answer.wait(LONG)
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    config = BrokerConfig.model_validate({"url": "amqp://u:p@broker.example/", "allow_plain": True})
    worker = AmqpWorkerTransport(config, topology, worker="w1")
    worker.open(Inbox())
    waiting = worker.publish(update(0))
    assert asked.wait(LONG)
    try:
        worker.close()
        assert isinstance(waiting.exception(LONG), BrokerUnreachable)
        assert not any(thread.name.startswith("fedmq worker") for thread in threading.enumerate())
    finally:
        answer.set()
