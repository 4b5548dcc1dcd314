"""``fedmq broker remove-worker``: a worker's account goes, and what it left, while the others work."""

from __future__ import annotations

import re
from typing import Annotated

import typer

from broker.accounts.federation import VHOST
from broker.accounts.options import VhostOption, accounts_of, remark
from broker.accounts.provision import close_connections, quoted
from broker.admin import Admin
from broker.console import BrokerOption, ConfigOption, SetOption, VerboseOption, broker_command, say
from broker.errors import AccessRefused, ConfigError
from broker.permissions import rights_of
from broker.topology import check_name

__all__ = ["remove_worker"]


def remove_worker(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The worker's, and so its account's.")],
    *,
    config: ConfigOption = None,
    broker: BrokerOption = None,
    vhost: VhostOption = VHOST,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Take a worker's account away: its connections end, it cannot come back, what is in its outbox is dropped.

    Updates of it that wait whole for the aggregator still count, and what is in the model stays. Run twice, it does
    nothing.

    Example: fedmq broker remove-worker w7
    """
    with broker_command(config, None, broker, settings, verbose) as read:
        check_name("worker", name)
        admin = Admin.of(read.broker)
        there = accounts_of(admin, vhost)
        if name in there and there[name].get("write") != rights_of("worker", name).write:
            raise ConfigError(
                f"account {name!r} has other rights in virtual host {vhost!r} than a worker's: rabbitmqctl "
                f"delete_user {name} removes it all the same"
            )
        if name in there:
            _close_account(admin, name, vhost)
        else:
            remark(f"there is no account {name!r} in virtual host {vhost!r}")
        for queue in _emptied(admin, name, vhost):
            say(queue)


def _close_account(admin: Admin, name: str, vhost: str) -> None:
    elsewhere = [
        str(row["vhost"]) for row in admin.listed(f"/users/{quoted(name)}/permissions") if row["vhost"] != vhost
    ]
    if elsewhere:
        admin.delete(f"/topic-permissions/{quoted(vhost)}/{quoted(name)}")
        admin.delete(f"/permissions/{quoted(vhost)}/{quoted(name)}")
        where = ", ".join(map(repr, elsewhere))
        say(f"account {name!r} may do nothing more in virtual host {vhost!r}; it stays, for {where}")
    else:
        # RabbitMQ ends its connections as well, most of the time.
        admin.delete(f"/users/{quoted(name)}")
        say(f"removed account {name!r}")
    close_connections(admin, name)


def _emptied(admin: Admin, name: str, vhost: str) -> list[str]:
    """Drop what is in the worker's queues. An outbox whose run goes on stays, since the aggregator looks after it."""
    own = re.compile(rf"fedmq\.([^.]+)\.(outbox\.{name}|notice\.{name}(\..+)?)")
    queues = {str(row["name"]): row for row in admin.queues(vhost)}
    told: list[str] = []
    for queue in sorted(queues):
        if (match := own.fullmatch(queue)) is None:
            continue
        path = f"/queues/{quoted(vhost)}/{quoted(queue)}"
        updates = queues.get(f"fedmq.{match.group(1)}.updates", {})
        try:
            if match.group(2).startswith("outbox") and updates.get("consumers"):
                admin.delete(f"{path}/contents")
                told.append(f"emptied queue {queue}; its run goes on")
            else:
                admin.delete(path)
                told.append(f"deleted queue {queue}")
        except AccessRefused:  # an administrator has no rights in a virtual host before somebody gives them
            told.append(f"left queue {queue}: this login has no rights in virtual host {vhost!r}")
    return told
