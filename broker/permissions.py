"""What each role may do on a broker, as data: RabbitMQ's permissions, those on topics, tags and limits.

``fedmq broker setup`` gives them, ``fedmq doctor`` tries and advises them, docs/accounts.md explains them. A virtual
host belongs to one federation, so they hold for all of its runs unless one is named.
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from broker.messages import EventKind
from broker.topology import CONTROL, DEAD, EVENTS, UPDATES

__all__ = [
    "ACCOUNT_ROLES",
    "ADMINISTRATORS",
    "RESERVED",
    "AccountRole",
    "Limits",
    "Rights",
    "Topic",
    "commands",
    "rights_of",
]

AccountRole = Literal["aggregator", "monitor", "operator", "worker"]
ACCOUNT_ROLES: tuple[AccountRole, ...] = ("aggregator", "monitor", "operator", "worker")

#: Names that stand for something else in routing keys, or are another account's by default.
RESERVED = frozenset({"aggregator", "monitor", "operator", "administrator", "broker", "unknown", "guest"})

ANY = r"[^.]+"
NOTHING = "^$"
_OF_WORKERS = rf"^fedmq\.{ANY}\.(outbox|notice)\..+$"
#: Of who makes and removes accounts: to empty and delete what a worker left. The management API does so with the rights
#: of who asks, and an administrator has none in a virtual host before somebody gives them.
ADMINISTRATORS = {"configure": _OF_WORKERS, "write": NOTHING, "read": _OF_WORKERS}
#: What workers and evaluators tell; of a status or a notice only an aggregator's word counts.
TOLD = (EventKind.HEARTBEAT, EventKind.PROGRESS, EventKind.EVALUATION, EventKind.CHECK)


@dataclass(frozen=True, slots=True)
class Topic:
    """Regular expressions for the keys of one topic exchange: of what is published, and of what queues are bound by."""

    exchange: str
    write: str
    read: str


@dataclass(frozen=True, slots=True)
class Limits:
    """What RabbitMQ lets an account have at once, on the whole broker."""

    connections: int
    channels: int


@dataclass(frozen=True, slots=True)
class Rights:
    """Three regular expressions for names of exchanges and queues, and more narrow ones for keys.

    An exchange without an entry in ``topics`` is open for all keys.
    """

    configure: str
    write: str
    read: str
    topics: tuple[Topic, ...]
    tags: tuple[str, ...]
    limits: Limits


def rights_of(role: AccountRole, name: str, *, run: str | None = None, worker: str = "") -> Rights:
    """The least that an account called ``name`` needs for ``role``.

    Args:
        role: an evaluator's is a worker's.
        name: the account; a worker's is called as the worker.
        run: one run only; all of the virtual host if None.
        worker: the worker's name if its account is called otherwise, whose updates no aggregator takes.
    """
    runs = ANY if run is None else re.escape(run)
    if role == "worker":
        return _of_worker(runs, worker or name, "{username}" if worker in {"", name} else worker)
    if role == "aggregator":
        return _of_aggregator(run)
    own = rf"{runs}\.watch\.{ANY}"
    seen = Topic(EVENTS, NOTHING, rf"^{runs}\..*$")
    if role == "monitor":
        return Rights(
            configure=rf"^fedmq\.{own}$",
            write=rf"^fedmq\.{own}$",
            read=rf"^fedmq\.(events|{runs}\.parameters|{own})$",
            topics=(seen,),
            tags=("monitoring",),
            limits=Limits(connections=32, channels=256),
        )
    return Rights(
        configure=rf"^fedmq\.{own}$",
        write=rf"^fedmq\.(control|updates|{own})$",
        read=rf"^fedmq\.(events|{runs}\.(parameters|dead)|{own})$",
        topics=(
            Topic(CONTROL, rf"^{runs}\.aggregator\.command$", NOTHING),
            # Dead letters go back under the keys of those who sent them, never into an outbox.
            Topic(UPDATES, rf"^{runs}\.{ANY}$", NOTHING),
            seen,
        ),
        tags=("policymaker",),
        limits=Limits(connections=32, channels=256),
    )


def _of_worker(runs: str, name: str, in_keys: str) -> Rights:
    # Nothing to configure: RabbitMQ has one such right for queues and exchanges, and an exchange of one's own that
    # hands on to another, or a queue that dead-letters there, goes round every permission on topics.
    told = "|".join(kind.value for kind in TOLD)
    return Rights(
        configure=NOTHING,
        write=r"^fedmq\.(updates|control|events)$",
        read=rf"^fedmq\.{runs}\.(parameters|chunks|notice\.{name})$",
        topics=(
            Topic(UPDATES, rf"^{runs}\.{in_keys}(\.chunk)?$", NOTHING),
            Topic(CONTROL, rf"^{runs}\.{in_keys}$", NOTHING),
            Topic(EVENTS, rf"^{runs}\.({told})\.{in_keys}$", NOTHING),
        ),
        tags=(),
        # Two connections, as many again while the broker has not given up those that broke silently, and a doctor's.
        limits=Limits(connections=8, channels=128),
    )


def _of_aggregator(run: str | None) -> Rights:
    everything = r"^fedmq\..*$" if run is None else rf"^fedmq\.(updates|control|events|dead|{re.escape(run)}\..*)$"
    its_own = rf"^{ANY if run is None else re.escape(run)}\..*$"
    return Rights(
        configure=everything,
        write=everything,
        read=everything,
        topics=tuple(Topic(exchange, its_own, its_own) for exchange in (UPDATES, CONTROL, EVENTS, DEAD)),
        tags=(),
        limits=Limits(connections=32, channels=1024),
    )


def commands(rights: Rights, vhost: str, user: str) -> list[str]:
    """Commands for a POSIX shell that give ``user`` these permissions: in general first, then those on topics."""
    where = f"-p {shlex.quote(vhost)} {shlex.quote(user)}"
    return [
        f"rabbitmqctl set_permissions {where} '{rights.configure}' '{rights.write}' '{rights.read}'",
        *(
            f"rabbitmqctl set_topic_permissions {where} {topic.exchange} '{topic.write}' '{topic.read}'"
            for topic in rights.topics
        ),
    ]
