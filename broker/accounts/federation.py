"""What a federation needs on a broker, as data: a virtual host, accounts, limits, policies."""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from broker.errors import ConfigError
from broker.permissions import ADMINISTRATORS, RESERVED, AccountRole, Rights, rights_of
from broker.policies import Policy, policies
from broker.topology import check_name

__all__ = [
    "MAX_CONNECTIONS",
    "MAX_QUEUES",
    "VHOST",
    "Account",
    "Federation",
    "check_worker",
    "definitions",
    "new_password",
    "password_hash",
]

VHOST = "fedmq"
#: What RabbitMQ lets a virtual host have, if nothing else is said: for some hundred workers.
MAX_CONNECTIONS = 2_000
MAX_QUEUES = 5_000
HASHING = "rabbit_password_hashing_sha256"


@dataclass(frozen=True, slots=True)
class Account:
    """A user of the broker and what it is for."""

    name: str
    role: AccountRole

    @property
    def rights(self) -> Rights:
        """What it may do."""
        return rights_of(self.role, self.name)


@dataclass(frozen=True, slots=True)
class Federation:
    """A virtual host, and all that belongs to it."""

    vhost: str
    accounts: tuple[Account, ...]
    policies: tuple[Policy, ...] = field(default_factory=policies)
    max_connections: int = MAX_CONNECTIONS
    max_queues: int = MAX_QUEUES

    def __post_init__(self) -> None:
        """Raises :class:`ConfigError` for names that cannot be an account's, or are two's."""
        if not self.vhost:
            raise ConfigError("--vhost: a virtual host has a name, such as 'fedmq'")
        for account in self.accounts:
            check_worker(account.name) if account.role == "worker" else check_name(f"--{account.role}", account.name)
        for name, times in Counter(account.name for account in self.accounts).items():
            if times > 1:
                raise ConfigError(f"{name!r} would be the name of {times} accounts: choose another for all but one")

    @property
    def limits(self) -> dict[str, int]:
        """Of the virtual host, as RabbitMQ calls them."""
        return {"max-connections": self.max_connections, "max-queues": self.max_queues}


def check_worker(name: str) -> str:
    """``name`` itself; raises :class:`ConfigError` if no worker may be called so."""
    check_name("worker", name)
    if name in RESERVED:
        raise ConfigError(f"worker = {name!r}: this name has another meaning on the broker; choose another")
    return name


def new_password() -> str:
    """192 bits, of characters that mean nothing in an address."""
    return secrets.token_urlsafe(24)


def password_hash(password: str, salt: bytes) -> str:
    """As RabbitMQ keeps it (https://www.rabbitmq.com/docs/passwords): ``salt`` of four bytes, and the hash."""
    return base64.b64encode(salt + hashlib.sha256(salt + password.encode()).digest()).decode()


def definitions(federation: Federation, passwords: Mapping[str, str], *, administrator: str = "") -> dict[str, Any]:
    """A definitions file, which RabbitMQ imports at its start (``load_definitions``) or later.

    Args:
        federation: what is to be there.
        passwords: by account; one without any can only log in by certificate.
        administrator: an account for who makes further ones; for none if empty. A broker that begins with definitions
            makes no ``guest``.
    """
    vhost = federation.vhost
    users = [
        {
            "name": account.name,
            **_credentials(passwords.get(account.name)),
            "tags": list(account.rights.tags),
            "limits": limits_of(account.rights),
        }
        for account in federation.accounts
    ]
    permissions = [{"user": account.name, "vhost": vhost, **general(account.rights)} for account in federation.accounts]
    if administrator:
        users.append(
            {
                "name": administrator,
                **_credentials(passwords.get(administrator)),
                "tags": ["administrator"],
                "limits": {},
            }
        )
        permissions.append({"user": administrator, "vhost": vhost, **ADMINISTRATORS})
    return {
        "vhosts": [{"name": vhost}],
        "users": users,
        "permissions": permissions,
        "topic_permissions": [
            {"user": account.name, "vhost": vhost, "exchange": topic.exchange, "write": topic.write, "read": topic.read}
            for account in federation.accounts
            for topic in account.rights.topics
        ],
        "parameters": [{"vhost": vhost, "component": "vhost-limits", "name": "limits", "value": federation.limits}],
        "policies": [policy.entry(vhost) for policy in federation.policies],
    }


def limits_of(rights: Rights) -> dict[str, int]:
    """Of an account, as RabbitMQ calls them."""
    return {"max-connections": rights.limits.connections, "max-channels": rights.limits.channels}


def general(rights: Rights) -> dict[str, str]:
    """The three permissions that do not go by keys."""
    return {"configure": rights.configure, "write": rights.write, "read": rights.read}


def _credentials(password: str | None) -> dict[str, str]:
    # An empty hash is none: RabbitMQ lets nobody in by a password then.
    hashed = "" if password is None else password_hash(password, secrets.token_bytes(4))
    return {"password_hash": hashed, "hashing_algorithm": HASHING}
