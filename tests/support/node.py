"""The RabbitMQ node that tests share, and ways to look at it."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn
from urllib.parse import unquote, urlsplit

import pika
import pika.exceptions
import pytest
from pydantic import SecretStr

from broker.admin import Admin
from broker.amqp.node import PrivateNode
from broker.settings import BrokerConfig
from broker.topology import Topology


class GivenNode(PrivateNode):
    """A broker that was there before the tests, which may not stop, freeze or reconfigure it.

    Its address is in ``TEST_RABBITMQ_URL`` (``amqp://user:password@host:port/``, an administrator, the virtual
    host ``/``) and the admin UI's in ``TEST_RABBITMQ_MANAGEMENT`` (``http://host:15672`` if not set). The tests
    leave queues, users and the exchanges ``fedmq.*`` behind.
    """

    def __init__(self, url: str, management_url: str) -> None:
        super().__init__()
        parts = urlsplit(url)
        self.user, self.password = unquote(parts.username or "guest"), unquote(parts.password or "guest")
        self._url = f"{url.rstrip('/')}/"
        self._management_url = management_url or f"http://{parts.hostname}:15672"

    @property
    def url(self) -> str:
        return self._url

    @property
    def management_url(self) -> str:
        return self._management_url

    def start(self) -> None:
        """It runs."""

    def resume(self) -> None:
        """It was not frozen."""

    def stop(self) -> NoReturn:
        pytest.skip("the broker of TEST_RABBITMQ_URL is not ours to stop")

    def kill(self) -> NoReturn:
        pytest.skip("the broker of TEST_RABBITMQ_URL is not ours to kill")

    def pause(self) -> NoReturn:
        pytest.skip("the broker of TEST_RABBITMQ_URL is not ours to freeze")

    def ctl(self, *arguments: str) -> NoReturn:
        pytest.skip(f"rabbitmqctl {' '.join(arguments)} does not reach the broker of TEST_RABBITMQ_URL")


def given_node() -> GivenNode | None:
    """The broker that ``TEST_RABBITMQ_URL`` names, if it names one."""
    url = os.environ.get("TEST_RABBITMQ_URL", "")
    return GivenNode(url, os.environ.get("TEST_RABBITMQ_MANAGEMENT", "")) if url else None


def require_rabbitmq() -> None:
    """Skip the test where RabbitMQ is not installed; in CI that is a failure."""
    available, reason = PrivateNode.available()
    if not available:
        if os.environ.get("CI"):
            pytest.fail(f"CI needs RabbitMQ: {reason}")
        pytest.skip(reason)


def config_of(node: PrivateNode, *, url: str = "", **more: object) -> BrokerConfig:
    """The table ``[broker]`` for ``node``."""
    # The broker of TEST_RABBITMQ_URL may be on another machine.
    own = {"url": SecretStr(url or node.url), "management_url": node.management_url, "allow_plain": True}
    return BrokerConfig.model_validate({**own, "heartbeat": 10, **more})


def admin_of(node: PrivateNode) -> Admin:
    """The node's admin API as its administrator."""
    return Admin.of(config_of(node))


def fresh_topology(prefix: str = "run") -> Topology:
    """A run that nobody else uses."""
    return Topology(f"{prefix}-{secrets.token_hex(4)}")


def add_user(node: PrivateNode, *, configure: str, write: str, read: str) -> str:
    """A new user with these permissions on ``/``; returns its AMQP address."""
    name, password = f"user-{secrets.token_hex(3)}", secrets.token_hex(8)
    admin = admin_of(node)
    admin.put(f"/users/{name}", {"password": password, "tags": ""})
    admin.put(f"/permissions/%2F/{name}", {"configure": configure, "write": write, "read": read})
    return node.url.replace(f"{node.user}:{node.password}", f"{name}:{password}")


@contextmanager
def channel(node: PrivateNode) -> Iterator[pika.adapters.blocking_connection.BlockingChannel]:
    """A channel of an ordinary client, to look at queues from outside."""
    connection = pika.BlockingConnection(pika.URLParameters(node.url))
    try:
        yield connection.channel()
    finally:
        if connection.is_open:
            connection.close()


def ready(node: PrivateNode, queue: str) -> int:
    """How many messages wait in ``queue`` and are in nobody's hands."""
    with channel(node) as inside:
        return int(inside.queue_declare(queue, passive=True).method.message_count)


def drain(node: PrivateNode, queue: str) -> list[tuple[pika.BasicProperties, bytes]]:
    """Take all messages out of ``queue``."""
    taken: list[tuple[pika.BasicProperties, bytes]] = []
    with channel(node) as inside:
        while True:
            method, properties, body = inside.basic_get(queue, auto_ack=True)
            if method is None:
                return taken
            taken.append((properties, body))
