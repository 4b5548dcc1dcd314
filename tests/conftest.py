"""Fixtures that more than one folder uses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import settings

from aggregator.optimizers import OPTIMIZERS
from aggregator.schedules import SCHEDULES
from aggregator.staleness import STALENESSES
from aggregator.strategies import STRATEGIES
from broker.amqp.node import PrivateNode
from broker.codecs import CODECS
from broker.parts import Parts
from tests.support.node import given_node, require_rabbitmq
from worker_client.loading import TASKS

# A busy machine is no bug: nothing here judges how long something takes.
settings.register_profile("fedmq", deadline=None)
settings.load_profile("fedmq")


@pytest.fixture(autouse=True)
def parts_as_before() -> Iterator[None]:
    """What a test's configuration named by its path is unknown to the next, as it is to another process."""
    kinds: tuple[Parts[Any], ...] = (OPTIMIZERS, SCHEDULES, STALENESSES, STRATEGIES, CODECS, TASKS)
    before = [dict(parts.imported) for parts in kinds]
    yield
    for parts, known in zip(kinds, before, strict=True):
        parts.imported.clear()
        parts.imported.update(known)


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
