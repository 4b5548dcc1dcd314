"""Queues and exchanges of a run that somebody deletes: declared again, with a word about it, and all goes on."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Iterator

import pika.exceptions
import pytest

from broker.amqp.node import PrivateNode
from broker.errors import ConnectionLost
from broker.messages import Reason
from broker.topology import CONTROL, DEAD, EVENTS, UPDATES, Topology
from broker.transport import Connected, Incoming, Outgoing, Source
from tests.support.ends import Ends, confirmed, version
from tests.support.node import channel, config_of, fresh_topology, ready
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

#: The aggregator looks every few seconds.
LONG = 90.0
NEWEST = version(7)

OBJECTS: dict[str, tuple[str, Callable[[Topology], str]]] = {
    "updates": ("queue", lambda topology: topology.updates),
    "control": ("queue", lambda topology: topology.control),
    "turn": ("queue", lambda topology: topology.turn),
    "dead": ("queue", lambda topology: topology.dead),
    "stream": ("queue", lambda topology: topology.parameters),
    "fanout": ("exchange", lambda topology: topology.parameters),
    UPDATES: ("exchange", lambda _: UPDATES),
    CONTROL: ("exchange", lambda _: CONTROL),
    EVENTS: ("exchange", lambda _: EVENTS),
    DEAD: ("exchange", lambda _: DEAD),
}


class Run:
    """A run at version 7 with an aggregator and a worker."""

    def __init__(self, node: PrivateNode, ends: Ends) -> None:
        self.node, self.ends, self.topology = node, ends, fresh_topology("deleted")
        self.aggregator, self.taken = ends.aggregator(config_of(node), self.topology)
        # As an aggregator does: the newest version on each connection.
        inbox = self.taken

        def sink(item: Incoming) -> None:
            inbox(item)
            if isinstance(item, Connected):
                self.aggregator.broadcast(NEWEST)

        self.aggregator._sink = sink
        self.aggregator.broadcast(NEWEST).result(LONG)
        self.worker, self.got = ends.worker(config_of(node), self.topology)
        self.got.wait_delivery(1, Source.PARAMETERS, LONG)

    def exists(self, kind: str, name: str) -> bool:
        with channel(self.node) as inside:
            try:
                getattr(inside, f"{kind}_declare")(name, passive=True)
            except pika.exceptions.ChannelClosedByBroker:
                return False
            return True

    def delete(self, kind: str, name: str) -> None:
        with channel(self.node) as inside:
            getattr(inside, f"{kind}_delete")(name)

    def check(self, mark: str) -> None:
        """Updates, hellos and events arrive, rejected updates become dead letters, and who joins now is served."""
        confirmed(self.worker.publish, Outgoing(body=mark.encode(), message_id=mark))
        self.taken.wait(lambda: mark.encode() in self.taken.bodies(), LONG)
        confirmed(self.worker.control, Outgoing(body=mark.encode(), message_id=f"hello-{mark}"))
        self.taken.wait(lambda: mark.encode() in self.taken.bodies(Source.CONTROL), LONG)

        def is_heard() -> bool:
            self.worker.event("heartbeat", Outgoing(body=mark.encode()))
            return mark.encode() in self.taken.bodies(Source.EVENT)

        wait_for(is_heard, LONG, what="an event")
        _, late = self.ends.worker(config_of(self.node), self.topology, f"late-{secrets.token_hex(3)}")
        assert late.wait_delivery(1, Source.PARAMETERS, LONG).body == NEWEST.body
        delivery = self.taken.deliveries()[-1]
        assert delivery.token is not None
        before = ready(self.node, self.topology.dead)
        self.aggregator.reject(delivery.token, Reason.TOO_STALE, "late", delivery)
        wait_for(lambda: ready(self.node, self.topology.dead) > before, LONG, what="a dead letter")


@pytest.fixture
def run(node: PrivateNode) -> Iterator[Run]:
    ends = Ends()
    try:
        yield Run(node, ends)
    finally:
        ends.close()


@pytest.mark.parametrize("what", OBJECTS)
def test_whatever_is_deleted_is_declared_again_with_a_word_about_it(
    what: str, run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    kind, name_of = OBJECTS[what]
    name = name_of(run.topology)
    run.check("before")

    # When somebody deletes a part of the run, and nobody sends anything
    with caplog.at_level(logging.WARNING):
        run.delete(kind, name)
        wait_for(lambda: run.exists(kind, name), LONG, what=f"the {kind} again")
        wait_for(lambda: f"somebody has deleted {kind} {name}" in caplog.text, LONG, what="a word")

    # Then all goes on, and a worker that joins has the newest version though there was no other since
    run.check("after")
    assert run.got.bodies(Source.PARAMETERS) == [NEWEST.body]
    assert run.taken.failures() == []


@pytest.mark.parametrize("name", [UPDATES, CONTROL, EVENTS, DEAD])
def test_an_exchange_that_another_run_made_again_is_bound_again(name: str, run: Run) -> None:
    """Then it is there when this run's aggregator looks, and nothing of this run is bound to it."""
    with channel(run.node) as inside:
        inside.exchange_delete(name)
        inside.exchange_declare(name, "topic", durable=True)

    run.check("after")


def test_a_worker_listens_to_notices_again(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.amqp.notices.AGAIN_SECONDS", 0.2)
    worker, inbox = run.ends.worker(config_of(run.node), run.topology, "w2")
    inbox.wait_delivery(1, Source.PARAMETERS, LONG)
    with channel(run.node) as inside:
        inside.exchange_delete(EVENTS)
        inside.exchange_declare(EVENTS, "topic", durable=True)

    def is_noticed() -> bool:
        run.aggregator.notify("w2", Outgoing(body=b"notice"))
        return b"notice" in inbox.bodies(Source.EVENT)

    wait_for(is_noticed, LONG, what="a notice")
    worker.close()


def test_a_stream_that_the_publishing_side_makes_again_has_the_newest_version(run: Run) -> None:
    """It notices first where a dead letter cannot be published; the consuming side finds all in order then."""
    connections = len(run.taken.connections())
    run.delete("queue", run.topology.parameters)

    run.aggregator._publisher.link.call(run.aggregator._publisher.link.renew, ConnectionLost("a test"))

    wait_for(lambda: run.exists("queue", run.topology.parameters), LONG, what="the stream")
    _, late = run.ends.worker(config_of(run.node), run.topology, "late")
    assert late.wait_delivery(1, Source.PARAMETERS, LONG).body == NEWEST.body
    assert len(run.taken.connections()) == connections
