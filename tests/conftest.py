"""Fixtures that more than one folder uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import settings

from broker.amqp.node import PrivateNode
from tests.support.node import given_node, require_rabbitmq

# A busy machine is no bug: nothing here judges how long something takes.
settings.register_profile("fedmq", deadline=None)
settings.load_profile("fedmq")


@pytest.fixture(scope="session")
def node() -> Iterator[PrivateNode]:
    """One RabbitMQ node for the session. A test that stops it must start it again.

    A private one, unless ``TEST_RABBITMQ_URL`` names another: see :class:`tests.support.node.GivenNode`.
    """
    given = given_node()
    if given is not None:
        yield given
        return
    require_rabbitmq()
    with PrivateNode(plugins=("rabbitmq_management", "rabbitmq_prometheus")) as running:
        yield running
