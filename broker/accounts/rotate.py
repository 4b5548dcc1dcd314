"""``fedmq broker rotate``: another password for an account, while the run goes on."""

from __future__ import annotations

from typing import Annotated

import typer

from broker.accounts.federation import VHOST, new_password
from broker.accounts.options import AddressOption, FolderOption, VhostOption, accounts_of, addresses_of, remark
from broker.accounts.provision import close_connections, quoted, tags_of
from broker.admin import Admin
from broker.console import BrokerOption, ConfigOption, SetOption, VerboseOption, broker_command, say
from broker.errors import ConfigError

__all__ = ["rotate"]


def rotate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The account.")],
    *,
    config: ConfigOption = None,
    broker: BrokerOption = None,
    vhost: VhostOption = VHOST,
    folder: FolderOption = None,
    address: AddressOption = None,
    close: Annotated[
        bool,
        typer.Option(
            "--close", help="End its connections too, which RabbitMQ leaves open: if the password was stolen."
        ),
    ] = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Give an account of the federation another password, and show once what goes on its machine.

    What is connected stays so, until the connection ends or with --close. Whoever has its address from a file
    (broker.url_file) reads that again when it connects: replace the file, and nothing has to be started anew.

    Example: fedmq broker rotate w7 --close
    """
    with broker_command(config, None, broker, settings, verbose) as read:
        admin = Admin.of(read.broker)
        if name == admin.user:
            raise ConfigError(f"{name!r} is whom you are logged in as: rabbitmqctl change_password {name}")
        if name not in accounts_of(admin, vhost):
            raise ConfigError(f"there is no account {name!r} in virtual host {vhost!r}: fedmq broker users lists them")
        addresses = addresses_of(read.broker, vhost, address=address, folder=folder)
        tags = ",".join(sorted(tags_of(admin.one(f"/users/{quoted(name)}"))))
        password = new_password()
        admin.put(f"/users/{quoted(name)}", {"password": password, "tags": tags})
        # After the broker has it: a worker on this machine that reads the file early would be refused.
        text, file = addresses.renew(name, password), addresses.file(name)
        remark(f"account {name!r} has another password now. This goes on its machine, in place of what is there:")
        say(text if file is None else str(file))
        remark(
            "it has broker.login_grace (60 s if not set) for that"
            if close
            else "connections that are open stay open: --close ends them"
        )
        if close:
            closed = close_connections(admin, name)
            remark(f"ended {closed} connection{'' if closed == 1 else 's'} of {name!r}")
