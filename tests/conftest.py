"""Fixtures that more than one folder uses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from broker.amqp.node import PrivateNode
from tests.support.node import require_rabbitmq


@pytest.fixture(scope="session")
def node() -> Iterator[PrivateNode]:
    """One private RabbitMQ node for the session. A test that stops it must start it again."""
    require_rabbitmq()
    with PrivateNode() as running:
        yield running
