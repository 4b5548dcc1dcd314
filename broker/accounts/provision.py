"""Make a broker as a federation needs it, through its management API. What is right already is not touched."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote

from broker.accounts.addresses import leads_here
from broker.accounts.federation import Account, Federation, general, limits_of
from broker.admin import Admin, Facts
from broker.errors import BrokerError, ConfigError
from broker.permissions import ADMINISTRATORS

__all__ = ["Known", "Outcome", "close_connections", "provision", "provision_accounts", "quoted", "tags_of"]


def quoted(part: str) -> str:
    """``part`` of a path of the API."""
    return quote(part, safe="")


@dataclass(slots=True)
class Outcome:
    """What was done and found."""

    changes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    made: list[str] = field(default_factory=list)
    """Names of accounts that were not there before."""


@dataclass(frozen=True, slots=True)
class Known:
    """What a broker has, as far as a virtual host is concerned."""

    vhosts: frozenset[str]
    users: Mapping[str, Facts]
    user_limits: Mapping[str, Mapping[str, int]]
    vhost_limits: Mapping[str, int]
    permissions: Mapping[str, Facts]
    topics: Mapping[tuple[str, str], Facts]
    policies: Mapping[str, Facts]

    @classmethod
    def of(cls, admin: Admin, vhost: str) -> Known:
        """Ask for it. Raises as :class:`Admin`'s methods, :class:`AccessRefused` for who is no administrator."""
        vhosts = frozenset(str(row["name"]) for row in admin.listed("/vhosts"))
        here = vhost in vhosts
        path = quoted(vhost)
        return cls(
            vhosts=vhosts,
            users={str(row["name"]): row for row in admin.listed("/users")},
            user_limits={str(row["user"]): row["value"] for row in admin.listed("/user-limits")},
            vhost_limits=next((r["value"] for r in admin.listed("/vhost-limits") if r.get("vhost") == vhost), {}),
            permissions=_by("user", admin.listed(f"/vhosts/{path}/permissions") if here else ()),
            topics={
                (str(row["user"]), str(row["exchange"])): row
                for row in (admin.listed(f"/vhosts/{path}/topic-permissions") if here else ())
            },
            policies=_by("name", admin.listed(f"/policies/{path}") if here else ()),
        )


def provision(admin: Admin, federation: Federation, password_for: Callable[[Account], str | None]) -> Outcome:
    """Make what is missing, and right what is otherwise; accounts that are there keep their passwords and tags.

    Args:
        admin: an administrator's.
        federation: what is to be there.
        password_for: asked once for each account that is to be made; None for one that logs in by certificate.

    Raises:
        ConfigError: the federation names the account that does this, which would take its rights away.
        BrokerError: as :class:`Admin`'s methods.
    """
    for account in federation.accounts:
        _refuse_own(admin, account)
    known, outcome = Known.of(admin, federation.vhost), Outcome()
    _vhost(admin, federation, known, outcome)
    for account in federation.accounts:
        _user(admin, account, known, outcome, password_for)
        _rights(admin, federation.vhost, account, known, outcome)
    for policy in federation.policies:
        body = policy.body()
        if not _fits(known.policies.get(policy.name), body):
            admin.put(f"/policies/{quoted(federation.vhost)}/{quoted(policy.name)}", body)
            outcome.changes.append(f"set policy {policy.name}: {policy.why}")
    if "guest" in known.users and not leads_here(admin.url):
        outcome.warnings.append(
            "this broker has the account 'guest', whose password everybody knows: rabbitmqctl delete_user guest"
        )
    return outcome


def _vhost(admin: Admin, federation: Federation, known: Known, outcome: Outcome) -> None:
    path = quoted(federation.vhost)
    if federation.vhost not in known.vhosts:
        admin.put(f"/vhosts/{path}", {})
        outcome.changes.append(f"made virtual host {federation.vhost!r}")
    there = known.permissions.get(admin.user)
    if there is None or all(there.get(right) == "^$" for right in ADMINISTRATORS):
        admin.put(f"/permissions/{path}/{quoted(admin.user)}", ADMINISTRATORS)
        outcome.changes.append(f"{admin.user!r} may delete what removed workers leave in {federation.vhost!r}")
    for limit, value in federation.limits.items():
        if known.vhost_limits.get(limit) != value:
            admin.put(f"/vhost-limits/{path}/{limit}", {"value": value})
            outcome.changes.append(f"limited virtual host {federation.vhost!r}: {limit} {value:,}")


def _user(
    admin: Admin, account: Account, known: Known, outcome: Outcome, password_for: Callable[[Account], str | None]
) -> None:
    name, rights = account.name, account.rights
    there = known.users.get(name)
    if there is None:
        password = password_for(account)
        secret = {"password_hash": ""} if password is None else {"password": password}
        admin.put(f"/users/{quoted(name)}", {**secret, "tags": ",".join(rights.tags)})
        outcome.made.append(name)
        outcome.changes.append(f"made account {name!r} ({account.role})")
    elif (tags := tags_of(there)) != set(rights.tags):
        outcome.warnings.append(
            f"account {name!r} was there with the tags {', '.join(sorted(tags)) or '(none)'}, "
            f"and a {account.role}'s are {', '.join(rights.tags) or '(none)'}: "
            f"rabbitmqctl set_user_tags {name} {' '.join(rights.tags)}".rstrip()
        )
    for limit, value in limits_of(rights).items():
        if known.user_limits.get(name, {}).get(limit) != value:
            admin.put(f"/user-limits/{quoted(name)}/{limit}", {"value": value})
            if there is not None:
                outcome.changes.append(f"limited account {name!r}: {limit} {value:,}")


def _rights(admin: Admin, vhost: str, account: Account, known: Known, outcome: Outcome) -> None:
    name, rights = account.name, account.rights
    changed = False
    if not _fits(known.permissions.get(name), body := general(rights)):
        admin.put(f"/permissions/{quoted(vhost)}/{quoted(name)}", body)
        changed = True
    for topic in rights.topics:
        entry = {"exchange": topic.exchange, "write": topic.write, "read": topic.read}
        if not _fits(known.topics.get((name, topic.exchange)), entry):
            admin.put(f"/topic-permissions/{quoted(vhost)}/{quoted(name)}", entry)
            changed = True
    if changed and name not in outcome.made:
        outcome.changes.append(f"account {name!r} has the rights of a {account.role} now, and no others")


def tags_of(user: Mapping[str, Any]) -> set[str]:
    """The tags of a user: a list, or text with commas from older brokers."""
    tags = user.get("tags", ())
    return {tag for tag in (tags.split(",") if isinstance(tags, str) else tags) if tag}


def _fits(there: Facts | None, wanted: Mapping[str, Any]) -> bool:
    return there is not None and all(there.get(key) == value for key, value in wanted.items())


def _by(key: str, rows: Iterable[Facts]) -> dict[str, Facts]:
    try:
        return {str(row[key]): row for row in rows}
    except KeyError:
        raise BrokerError(f"the management API answers without {key!r}: another version of RabbitMQ?") from None


def provision_accounts(admin: Admin, federation: Federation, password_for: Callable[[Account], str | None]) -> Outcome:
    """As :func:`provision`, without the virtual host, its limits and its policies, which stay as they are."""
    known, outcome = Known.of(admin, federation.vhost), Outcome()
    for account in federation.accounts:
        _refuse_own(admin, account)
        _user(admin, account, known, outcome, password_for)
        _rights(admin, federation.vhost, account, known, outcome)
    return outcome


def close_connections(admin: Admin, name: str) -> int:
    """End what ``name`` has open, in whichever virtual host; how many those were.

    By user, which RabbitMQ keeps track of at once: its list of connections is five seconds behind, and one that is not
    on it yet cannot be ended by its name.
    """
    path = f"/connections/username/{quoted(name)}"
    own = admin.found(path)
    if own:
        admin.delete(path)
    return len(own)


def _refuse_own(admin: Admin, account: Account) -> None:
    if account.name == admin.user:
        raise ConfigError(f"{account.name!r} is the administrator that you are logged in as: choose another name")
