"""OAuth2 tokens as passwords: a connection outlives its first one, and comes back when there is a new one at last."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.admin import Admin
from broker.amqp.look import counts
from broker.amqp.node import PrivateNode
from broker.errors import AccessRefused, BrokerUnreachable
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Outgoing
from tests.support.ends import Ends, confirmed
from tests.support.node import fresh_topology, require_rabbitmq
from tests.support.tokens import jwt, put, token_node
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.broker, pytest.mark.slow]
#: Of a token that a test lets expire; time enough to connect with it on a busy machine.
LIFE = 12


@pytest.fixture(scope="module")
def issuer() -> Iterator[PrivateNode]:
    """One node for all tests here."""
    require_rabbitmq()
    with token_node() as running:
        yield running


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.close()


def config_with(node: PrivateNode, file: Path) -> BrokerConfig:
    url = f"amqp://{node.url.rpartition('@')[2]}"
    return BrokerConfig.model_validate(
        {"url": url, "management_url": node.management_url, "token_file": file, "heartbeat": 10}
    )


def test_a_connection_outlives_its_first_token(issuer: PrivateNode, tmp_path: Path, ends: Ends) -> None:
    topology = fresh_topology("token")
    # RabbitMQ 3.10 calls it by the one, later ones by the other; the broker lets nobody publish in another's name.
    lasting = config_with(issuer, put(tmp_path / "a", jwt(sub="subject", client_id="client")))
    aggregator, inbox = ends.aggregator(lasting, topology)
    assert aggregator.account in {"subject", "client"}
    first = jwt(LIFE, sub="w1", client_id="w1")
    expires = time.time() + LIFE
    renewed, late = put(tmp_path / "w1", first), put(tmp_path / "w2", first)
    good, good_inbox = ends.worker(config_with(issuer, renewed), topology)
    bad, bad_inbox = ends.worker(config_with(issuer, late), topology)
    put(renewed, jwt(sub="w1", client_id="w1"))

    time.sleep(max(0.0, expires + 1 - time.time()))
    confirmed(good.publish, Outgoing(body=b"with the second", headers={"worker": "w1"}))
    assert (good_inbox.losses(), good_inbox.failures()) == ([], [])
    assert inbox.wait_delivery().user == "w1"

    # The other has none that is good: it is refused, goes on trying, and works again as soon as there is one.
    bad.drop()
    wait_for(bad_inbox.losses, what="a broken connection")
    with pytest.raises(BrokerUnreachable, match=r"the token in broker.token_file has expired"):
        counts(config_with(issuer, late), topology)
    put(late, jwt(sub="w1", client_id="w1"))
    confirmed(bad.publish, Outgoing(body=b"at last", headers={"worker": "w1"}))
    assert bad_inbox.failures() == []
    assert inbox.wait_delivery(2).body == b"at last"


def test_a_token_that_the_broker_does_not_believe(issuer: PrivateNode, tmp_path: Path) -> None:
    file = put(tmp_path / "forged", jwt(sub="w1", key=b"another key of thirty-two bytes, or more"))
    with pytest.raises(AccessRefused, match=r"user 'w1': the signature, audience and scopes"):
        counts(config_with(issuer, file), Topology("nobody-s"))


def test_the_management_api_takes_it_too(issuer: PrivateNode, tmp_path: Path) -> None:
    file = put(tmp_path / "operator", jwt(sub="olga", scope=["rabbitmq.tag:administrator", "rabbitmq.read:*/*"]))
    assert Admin.of(config_with(issuer, file)).overview()["rabbitmq_version"]
