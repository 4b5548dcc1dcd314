"""A federation on a real broker with an account for everybody, a run in it that goes on, and attackers beside it.

The run's workers publish fixed updates, in a fixed order, through the transport that real workers have. So each version
is the same bit by bit as in a run that nobody attacked, or an attack has had an effect.
"""

from __future__ import annotations

import secrets
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import numpy as np
import pika
import pika.exceptions
from pika.adapters.blocking_connection import BlockingChannel

from broker.admin import Admin
from broker.amqp.node import PrivateNode
from broker.amqp.workerside import AmqpWorkerTransport
from broker.messages import (
    Manifest,
    Mode,
    ModelSpec,
    ParametersHead,
    Role,
    Tensors,
    Update,
    UpdateId,
)
from broker.permissions import AccountRole, rights_of
from broker.settings import BrokerConfig
from broker.topology import Topology
from broker.transport import Delivery, Source
from broker.wire import decode, encode
from tests.support.builders import spec_of
from tests.support.node import admin_of, config_of
from tests.support.site import Site
from tests.support.waiting import Inbox, wait_for
from worker_client.guard import Guard
from worker_client.sending import Sender

__all__ = ["CHUNK_BYTES", "CREW", "WIDTH", "Account", "Federation", "Run", "answer_of", "initial", "update_of"]

T = TypeVar("T")

#: For a busy machine.
PATIENCE = 60.0
#: As small as it may be, so that a small model travels in chunks and every worker has an outbox.
CHUNK_BYTES = 65536
WIDTH = 20_000
#: How many workers are honest, which is what makes a round.
CREW = 3
SETTINGS: Mapping[str, Mapping[str, Any]] = {
    "broker": {"heartbeat": 10, "chunk_bytes": CHUNK_BYTES},
    "aggregator": {
        "buffer_size": CREW,
        # Its state has a memory: an update that was counted once shows in every later version.
        "optimizer": "adam",
        "learning_rate": 0.01,
        "linger": 0.5,
        "worker_timeout": 600.0,
    },
}


@dataclass(frozen=True)
class Account:
    """A login at the broker."""

    name: str
    password: str

    def url(self, node: PrivateNode, vhost: str) -> str:
        """Its AMQP address."""
        login = f"{self.name}:{self.password}"
        return node.url.replace(f"{node.user}:{node.password}", login).rstrip("/") + f"/{quote(vhost, safe='')}"


class Federation:
    """A virtual host, and accounts with exactly the rights that each role is given."""

    def __init__(self, node: PrivateNode) -> None:
        self.node = node
        self.admin = admin_of(node)
        self.vhost = f"federation-{secrets.token_hex(3)}"
        self.admin.put(f"/vhosts/{self.vhost}", {})
        everything = {"configure": ".*", "write": ".*", "read": ".*"}
        self.admin.put(f"/permissions/{self.vhost}/{quote(node.user)}", everything)
        self.aggregator = self.account("aggregator")
        self.monitor = self.account("monitor")
        self.operator = self.account("operator")
        self.mallory = self.account("worker", "mallory")
        """A worker that belongs to the federation, and a bad one."""
        self.crew = [self.account("worker", name) for name in ("ann", "ben", "cid")]
        self.stranger = self.account("worker", "stranger", vhost="")
        """A worker of another federation."""
        self._connections: dict[str, pika.BlockingConnection] = {}

    def account(self, role: AccountRole, name: str = "", *, vhost: str | None = None) -> Account:
        """A new account with the rights of ``role``; without ``vhost`` none in this one."""
        account = Account(f"{name or role}-{secrets.token_hex(2)}", secrets.token_hex(8))
        rights = rights_of(role, account.name)
        admin = self.admin
        admin.put(f"/users/{account.name}", {"password": account.password, "tags": ",".join(rights.tags)})
        if vhost == "":
            return account
        admin.put(
            f"/permissions/{self.vhost}/{account.name}",
            {"configure": rights.configure, "write": rights.write, "read": rights.read},
        )
        for topic in rights.topics:
            admin.put(
                f"/topic-permissions/{self.vhost}/{account.name}",
                {"exchange": topic.exchange, "write": topic.write, "read": topic.read},
            )
        for limit, value in (
            ("max-connections", rights.limits.connections),
            ("max-channels", rights.limits.channels),
        ):
            admin.put(f"/user-limits/{account.name}/{limit}", {"value": value})
        return account

    def remove(self, account: Account) -> None:
        """Take the account away."""
        self.admin._request("DELETE", f"/users/{account.name}")

    def config(self, account: Account) -> BrokerConfig:
        """The table ``[broker]`` of ``account``."""
        return config_of(self.node, url=account.url(self.node, self.vhost), chunk_bytes=CHUNK_BYTES)

    def api(self, account: Account) -> Admin:
        """The management API as ``account``."""
        return Admin(self.node.management_url, account.name, account.password)

    def connect(self, account: Account, *, vhost: str = "", password: str = "") -> pika.BlockingConnection:
        """A connection of an ordinary client. Raises what the broker answers."""
        login = Account(account.name, password or account.password)
        return pika.BlockingConnection(pika.URLParameters(login.url(self.node, vhost or self.vhost)))

    @contextmanager
    def channel(self, account: Account) -> Iterator[BlockingChannel]:
        """A channel with confirms, on the one connection that ``account`` keeps here."""
        connection = self._connections.get(account.name)
        if connection is None or not connection.is_open:
            connection = self._connections[account.name] = self.connect(account)
        channel = connection.channel()
        channel.confirm_delivery()
        try:
            yield channel
        finally:
            if channel.is_open:
                channel.close()

    @property
    def administrator(self) -> Account:
        """Who may do everything."""
        return Account(self.node.user, self.node.password)

    def close(self) -> None:
        """End what is open here, and take back the virtual host with all that is in it."""
        for connection in self._connections.values():
            if connection.is_open:
                connection.close()
        self.admin._request("DELETE", f"/vhosts/{self.vhost}")


def answer_of(deed: Callable[[], object]) -> str:
    """How the broker refuses ``deed``: code and name; ``"done"`` if it does not."""
    try:
        deed()
    except pika.exceptions.ChannelClosedByBroker as closed:
        return f"{closed.reply_code} {closed.reply_text.split()[0]}"
    except pika.exceptions.ConnectionClosedByBroker as closed:
        return f"{closed.reply_code} {closed.reply_text.split()[0]}"
    except pika.exceptions.ProbableAuthenticationError as refused:
        return f"{refused.args[0]} ACCESS_REFUSED" if refused.args[:1] == (403,) else "403 ACCESS_REFUSED"
    except pika.exceptions.ProbableAccessDeniedError:
        return "530 NOT_ALLOWED"
    return "done"


def initial() -> Tensors:
    """The parameters that the run begins with."""
    return {
        "weights": np.random.default_rng(7).standard_normal(WIDTH, dtype=np.float32),
        "bias": np.zeros(8, dtype=np.float32),
    }


def update_of(head: ParametersHead, model: ModelSpec, worker: str, index: int, **other: Any) -> Update:
    """The update that worker ``index`` has for this version: the same in every run."""
    random = np.random.default_rng((head.version, index))
    tensors = {spec.name: random.standard_normal(spec.shape, dtype=np.float32) for spec in model.tensors}
    facts: dict[str, Any] = {
        "run": head.run,
        "id": UpdateId(worker, "life", head.version),
        "base_version": head.version,
        "base_epoch": head.epoch,
        "mode": Mode.DELTA,
        "examples": 10 + index,
    }
    return Update(model=model, tensors=tensors, **{**facts, **other})


@dataclass
class Worker:
    """An honest one: the real transport, and nothing but."""

    account: Account
    index: int
    transport: AmqpWorkerTransport
    sender: Sender
    guard: Guard
    inbox: Inbox = field(default_factory=Inbox)

    @property
    def heads(self) -> list[ParametersHead]:
        """Of the versions that came."""
        return [head for delivery in self.inbox.deliveries(Source.PARAMETERS) if (head := _head_of(delivery))]

    def publish(self, update: Update) -> Future[None]:
        """Send it, in chunks."""
        return self.transport.publish(self.sender.cut(update, CHUNK_BYTES))


def _head_of(delivery: Delivery) -> ParametersHead | None:
    message = decode(delivery.body)
    if isinstance(message, Manifest):
        return message.head if isinstance(message.head, ParametersHead) else None
    return message if isinstance(message, ParametersHead) else None


class Run:
    """One run of a federation: an aggregator as a process, and honest workers; a context manager."""

    def __init__(self, federation: Federation, folder: Path, prefix: str) -> None:
        self.federation = federation
        url = federation.aggregator.url(federation.node, federation.vhost)
        self.site = Site(folder, url, workers=0, settings=SETTINGS, prefix=prefix)
        self.topology: Topology = self.site.topology
        self.model: ModelSpec = spec_of(initial())
        self.crew: list[Worker] = []
        self._buried: dict[str | None, str] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self._stack.enter_context(self.site)
        self.site.store.create(self.model, initial(), now=0.0)
        self.process: subprocess.Popen[bytes] = self.site.command("aggregator")
        for index, account in enumerate(self.federation.crew):
            transport = AmqpWorkerTransport(self.federation.config(account), self.topology, worker=account.name)
            sender = Sender(self.topology.run, account.name, "life", Role.TRAINER)
            worker = Worker(account, index, transport, sender, Guard(None, account.name, self.topology.run, None))
            transport.open(worker.inbox, believe=worker.guard.believes)
            self._stack.callback(transport.close)
            self.crew.append(worker)
        self.wait_for(lambda: self._head(0), "the first version")
        for worker in self.crew:
            worker.transport.control(worker.sender.hello(0)).result(PATIENCE)
            self.wait_for(lambda worker=worker: self._has_outbox(worker), "an outbox")  # type: ignore[misc]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    @property
    def version(self) -> int:
        """The newest that the first worker has."""
        return max((head.version for head in self.crew[0].heads), default=-1)

    @property
    def log(self) -> str:
        """What the aggregator has said."""
        return self.site.log()

    def key(self, account: Account) -> str:
        """The routing key of what ``account`` publishes as a worker."""
        return self.topology.key(account.name)

    def head(self, version: int) -> ParametersHead:
        """What came with ``version``."""
        head = self._head(version)
        assert head is not None, f"no version {version}"
        return head

    def update(self, account: Account, **other: Any) -> Update:
        """An update for the newest version that would count, from ``account``."""
        seq = secrets.randbelow(2**40)
        other.setdefault("id", UpdateId(account.name, "life", seq))
        return update_of(self.head(self.version), self.model, account.name, 99, **other)

    def sheet(self, update: Update, user: str | None) -> tuple[pika.BasicProperties, bytes]:
        """``update`` in one piece, as an ordinary client sends it."""
        properties = pika.BasicProperties(
            message_id=str(update.id),
            user_id=user,
            delivery_mode=2,
            headers={"run": update.run, "worker": update.id.worker},
        )
        return properties, encode(update)

    def round(self) -> str:
        """One round of honest updates, one after the other; the digest of the version that they make."""
        head = self.head(self.version)
        for worker in self.crew:
            worker.publish(update_of(head, self.model, worker.account.name, worker.index)).result(PATIENCE)
        self.wait_for(lambda: self._head(head.version + 1), f"version {head.version + 1}")
        return self.head(head.version + 1).digest

    def buried(self, message_id: str) -> str:
        """The reason for which the aggregator has rejected the message; waits for that, and takes it away."""

        def look() -> str:
            with self.federation.channel(self.federation.administrator) as channel:
                while True:
                    method, properties, _ = channel.basic_get(self.topology.dead, auto_ack=True)
                    if method is None:
                        return ""
                    headers = properties.headers or {}
                    self._buried[properties.message_id] = str(headers.get("reason", ""))
                    if properties.message_id == message_id:
                        return self._buried[message_id]

        return self._buried.get(message_id) or self.wait_for(look, f"the dead letter {message_id}")

    def said(self, *words: str) -> bool:
        """Wait until one line of the aggregator's log has all these words."""
        return self.wait_for(
            lambda: any(all(word in line for word in words) for line in self.log.splitlines()), f"{words} in the log"
        )

    def stop(self) -> None:
        """As an operator ends a run."""
        self.process.terminate()
        assert self.process.wait(PATIENCE) == 0, self.log[-3000:]

    def _head(self, version: int) -> ParametersHead | None:
        return next((head for head in self.crew[0].heads if head.version == version), None)

    def _has_outbox(self, worker: Worker) -> bool:
        with self.federation.channel(self.federation.administrator) as channel:
            return (
                answer_of(lambda: channel.queue_declare(self.topology.outbox(worker.account.name), passive=True))
                == "done"
            )

    def wait_for(self, condition: Callable[[], T], what: str) -> T:
        """Wait until ``condition`` is true; its value. Fails if the aggregator ends."""

        def look() -> T:
            assert self.process.poll() is None, f"the aggregator has ended:\n{self.log[-3000:]}"
            return condition()

        try:
            return wait_for(look, PATIENCE, what=what)
        except AssertionError as error:
            raise AssertionError(f"{error}; the aggregator's log:\n{self.log[-3000:]}") from None
