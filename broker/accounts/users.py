"""``fedmq broker users``: who may do what in a federation's virtual host, and who is there."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass

from rich.table import Table

from broker.accounts.federation import VHOST, general
from broker.accounts.options import VhostOption, accounts_of
from broker.accounts.provision import tags_of
from broker.admin import Admin, Facts
from broker.console import BrokerOption, ConfigOption, JsonOption, SetOption, VerboseOption, broker_command, say
from broker.console import say_table as show
from broker.permissions import ACCOUNT_ROLES, rights_of

__all__ = ["Row", "rows", "users"]

NOTHING = {"configure": "^$", "write": "^$", "read": "^$"}


@dataclass(frozen=True, slots=True)
class Row:
    """One account, as it is shown."""

    name: str
    role: str
    """Whose rights it has; ``administrator`` of the whole broker by its tag, ``other`` if nobody's that fedmq gives."""
    tags: tuple[str, ...]
    connections: int
    since: float | None
    """Unix time since when it is connected; RabbitMQ does not keep when somebody left."""
    runs: tuple[str, ...]


def users(
    *,
    config: ConfigOption = None,
    broker: BrokerOption = None,
    vhost: VhostOption = VHOST,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """List the accounts of a federation: their roles by their rights, and who is connected since when.

    Example: fedmq broker users
    """
    with broker_command(config, None, broker, settings, verbose) as read:
        admin = Admin.of(read.broker)
        permissions = accounts_of(admin, vhost)
        topics = [row for row in admin.listed("/topic-permissions") if row.get("vhost") == vhost]
        found = rows(permissions, topics, admin.listed("/users"), admin.connections(), vhost)
    if as_json:
        say(json.dumps({"vhost": vhost, "users": [asdict(row) for row in found]}))
        return
    table = Table(box=None, pad_edge=False)
    for column in ("account", "rights of", "tags", "connections", "connected for", "runs"):
        table.add_column(column)
    for row in found:
        shown = "-" if row.since is None else f"{max(0.0, time.time() - row.since):,.0f} s"
        table.add_row(
            row.name, row.role, ", ".join(row.tags) or "-", str(row.connections), shown, ", ".join(row.runs) or "-"
        )
    show(table)


def rows(
    permissions: Mapping[str, Facts],
    topics: Iterable[Facts],
    accounts: Iterable[Facts],
    connections: Iterable[Facts],
    vhost: str,
) -> list[Row]:
    """Of what the management API answers, one row for each account that has permissions."""
    tags = {str(row["name"]): tuple(sorted(tags_of(row))) for row in accounts}
    keys: dict[str, dict[str, tuple[object, object]]] = {}
    for row in topics:
        keys.setdefault(str(row["user"]), {})[str(row["exchange"])] = (row.get("write"), row.get("read"))
    ours = [row for row in connections if row.get("vhost") == vhost]
    found = []
    for name in sorted(permissions):
        own = [row for row in ours if row.get("user") == name]
        begun = [row["connected_at"] / 1000 for row in own if isinstance(row.get("connected_at"), int | float)]
        found.append(
            Row(
                name=name,
                role=(
                    "administrator"
                    if "administrator" in tags.get(name, ())
                    else _role(name, permissions[name], keys.get(name, {}))
                ),
                tags=tags.get(name, ()),
                connections=len(own),
                since=min(begun, default=None),
                runs=tuple(sorted({run for row in own if (run := _run_of(row))})),
            )
        )
    return found


def _role(name: str, permissions: Facts, keys: Mapping[str, tuple[object, object]]) -> str:
    has = {right: permissions.get(right) for right in NOTHING}
    if has == NOTHING:
        return "none"
    for role in ACCOUNT_ROLES:
        rights = rights_of(role, name)
        wanted = {topic.exchange: (topic.write, topic.read) for topic in rights.topics}
        if has == general(rights) and {exchange: keys.get(exchange) for exchange in wanted} == wanted:
            return role
    return "other"


def _run_of(connection: Facts) -> str:
    """The run that a connection of fedmq's works for, as its name says."""
    properties = connection.get("client_properties")
    name = str(properties.get("connection_name", "")) if isinstance(properties, dict) else ""
    _, found, rest = name.partition(" · run ")
    return rest.partition(" ")[0] if found else ""
