"""``fedmq broker add-worker``: an account for one more worker, while the others work."""

from __future__ import annotations

from typing import Annotated

import typer

from broker.accounts.federation import VHOST, Account, Federation, new_password
from broker.accounts.options import (
    AddressOption,
    CertificateOption,
    FolderOption,
    VhostOption,
    accounts_of,
    addresses_of,
    remark,
)
from broker.accounts.provision import provision_accounts
from broker.admin import Admin
from broker.console import BrokerOption, ConfigOption, SetOption, VerboseOption, broker_command, say

__all__ = ["add_worker"]


def add_worker(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The worker's, and so its account's.")],
    *,
    config: ConfigOption = None,
    broker: BrokerOption = None,
    vhost: VhostOption = VHOST,
    folder: FolderOption = None,
    address: AddressOption = None,
    by_certificate: CertificateOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Make a worker's account, and show once what goes on its machine. An evaluator's is the same.

    Example: fedmq broker add-worker w7 --address amqps://rabbit.example.org:5671
    """
    with broker_command(config, None, broker, settings, verbose) as read:
        account = Account(name, "worker")
        federation = Federation(vhost, (account,))
        admin = Admin.of(read.broker)
        accounts_of(admin, vhost)
        addresses = addresses_of(read.broker, vhost, address=address, folder=folder, by_certificate=by_certificate)
        shown: list[str] = []

        def password_for(_account: Account) -> str | None:
            password = None if by_certificate else addresses.known(name) or new_password()
            shown.append(addresses.keep(name, password))
            return password

        outcome = provision_accounts(admin, federation, password_for)
        for warning in outcome.warnings:
            remark(f"warning: {warning}")
        if not outcome.made:
            for change in outcome.changes:
                say(change)
            remark(f"account {name!r} was there and keeps its password; fedmq broker rotate {name} gives it another")
            return
        file = addresses.file(name)
        remark(f"made account {name!r} (worker) in virtual host {vhost!r}. This goes on its machine:")
        say(shown[0] if file is None else str(file))
        remark(
            "\n".join(
                (
                    "It is not shown again. There:" if file is None else "There:",
                    "  install -m 600 /dev/stdin broker.url     # give it the address, then Ctrl-D",
                    "  export FEDMQ_BROKER_URL_FILE=$PWD/broker.url",
                    f"  fedmq worker --name {name} --run RUN --task MODULE:CLASS",
                )
            )
        )
