"""Both transports behind a network that cuts inside frames, swallows and slices."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport, AmqpWorkerTransport
from broker.errors import ConnectionLost
from broker.settings import BrokerConfig
from broker.transport import Outgoing, Source
from tests.support.frames import BODY
from tests.support.node import config_of, fresh_topology, ready
from tests.support.proxy import Direction, Proxy
from tests.support.waiting import Inbox, wait_for

pytestmark = [pytest.mark.broker, pytest.mark.timeout(600)]

#: Heartbeats come every few seconds at most, and a silent peer is given up after about two.
PATIENCE = 180.0
LARGE = bytes(range(256)) * 2000


class Ends:
    """An aggregator and a worker of a fresh run; each with two proxies before the broker."""

    def __init__(self, node: PrivateNode, stack: ExitStack) -> None:
        self.node, self.topology = node, fresh_topology("network")
        self.near_aggregator, self.near_worker = (
            [stack.enter_context(Proxy.to(node.url, seed=seed)) for seed in range(2)] for _ in range(2)
        )
        self.aggregator = AmqpAggregatorTransport(
            self._config(self.near_aggregator), self.topology, model_bytes=len(LARGE), prefetch=8
        )
        self.worker = AmqpWorkerTransport(self._config(self.near_worker), self.topology, worker="w0")
        self.taken, self.got = Inbox(), Inbox()
        for end, inbox in ((self.aggregator, self.taken), (self.worker, self.got)):
            stack.callback(end.close)
            end.open(inbox)
            inbox.wait(inbox.connections, PATIENCE)
        # The worker's last step is to listen to the versions.
        self.broadcast(b"first")
        self.got.wait_delivery(source=Source.PARAMETERS, timeout=PATIENCE)

    def _config(self, proxies: list[Proxy]) -> BrokerConfig:
        return config_of(self.node, url=",".join(proxy.url(self.node.url) for proxy in proxies), heartbeat=5)

    def broadcast(self, body: bytes, version: int = 0) -> None:
        headers: dict[str, str | int] = {"epoch": 1, "version": version, "attempt": 0}
        self.aggregator.broadcast(Outgoing(body=body, headers=headers)).result(PATIENCE)

    def publish(self, body: bytes) -> None:
        """Publish until it is confirmed, as a worker does."""
        while True:
            try:
                self.worker.publish(Outgoing(body=body, message_id="w0/i/0")).result(PATIENCE)
            except ConnectionLost:
                continue
            return


@pytest.fixture
def ends(node: PrivateNode) -> Iterator[Ends]:
    with ExitStack() as stack:
        yield Ends(node, stack)


def test_half_an_update_is_none_and_the_whole_comes_after_it(ends: Ends) -> None:
    # Given a connection that breaks in the middle of the update's body
    cuts = [proxy.cut_in_frame(60_000, kind=BODY, least=60_000) for proxy in ends.near_worker]

    with pytest.raises(ConnectionLost):
        ends.worker.publish(Outgoing(body=LARGE, message_id="w0/i/0")).result(PATIENCE)
    assert any(cut.happened.is_set() for cut in cuts)
    for proxy in ends.near_worker:
        proxy.heal()

    # When it is published again
    ends.publish(LARGE)

    # Then it is there once, and nothing else
    assert ends.taken.wait_delivery(timeout=PATIENCE).body == LARGE
    ends.publish(b"last")
    assert ends.taken.wait_delivery(2, timeout=PATIENCE).body == b"last"


def test_half_a_delivery_comes_again_whole(ends: Ends) -> None:
    for proxy in ends.near_aggregator:
        proxy.cut_in_frame(60_000, kind=BODY, least=60_000, direction=Direction.DOWN)
    before = len(ends.taken.connections())
    ends.publish(LARGE)
    ends.taken.wait(ends.taken.losses, PATIENCE)
    for proxy in ends.near_aggregator:
        proxy.heal()

    delivery = ends.taken.wait_delivery(timeout=PATIENCE)

    assert delivery.body == LARGE
    assert delivery.token is not None
    assert delivery.token.generation > before
    ends.aggregator.ack(delivery.token)
    ends.publish(b"last")
    assert ends.taken.wait_delivery(2, timeout=PATIENCE).body == b"last"


def test_half_a_broadcast_is_sent_again_and_half_a_version_is_read_again(ends: Ends) -> None:
    for proxy in ends.near_aggregator:
        proxy.cut_in_frame(60_000, kind=BODY, least=60_000)
    for proxy in ends.near_worker:
        proxy.cut_in_frame(60_000, kind=BODY, least=60_000, direction=Direction.DOWN)

    # Each address may cut once.
    ends.broadcast(LARGE, version=1)

    assert ends.got.wait_delivery(2, Source.PARAMETERS, PATIENCE).body == LARGE


@pytest.mark.slow
@pytest.mark.parametrize("direction", Direction)
def test_a_silent_address_is_given_up_for_another(ends: Ends, direction: Direction) -> None:
    # Given that one address of the aggregator's swallows everything in one direction, with all that runs over it
    silent, other = sorted(ends.near_aggregator, key=lambda proxy: -proxy.connections)
    silent.hole(direction)
    ends.publish(b"update")

    # Then the update arrives over the other address, if it was not there before
    delivery = ends.taken.wait_delivery(timeout=PATIENCE)
    assert delivery.body == b"update"
    wait_for(lambda: other.connections == 2, PATIENCE, what="both connections over the other address")
    silent.heal()
    assert delivery.token is not None


def test_bytes_in_pieces_of_three_are_the_same_bytes(ends: Ends) -> None:
    for proxy in (*ends.near_aggregator, *ends.near_worker):
        proxy.slices(3)
    body = LARGE[:3000]

    ends.publish(body)
    ends.broadcast(body, version=1)

    assert ends.taken.wait_delivery(timeout=PATIENCE).body == body
    assert ends.got.wait_delivery(2, Source.PARAMETERS, PATIENCE).body == body
    assert ready(ends.node, ends.topology.updates) == 0
