"""``fedmq broker setup``: a virtual host for a federation, with an account for each who takes part in it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from broker.accounts.addresses import Addresses
from broker.accounts.federation import (
    MAX_CONNECTIONS,
    MAX_QUEUES,
    VHOST,
    Account,
    Federation,
    definitions,
    new_password,
)
from broker.accounts.options import (
    AddressOption,
    CertificateOption,
    FolderOption,
    VhostOption,
    addresses_of,
    remark,
)
from broker.accounts.provision import provision
from broker.admin import Admin
from broker.console import BrokerOption, ConfigOption, SetOption, VerboseOption, broker_command, say
from broker.errors import ConfigError
from broker.policies import DEAD_BYTES, UPDATE_BYTES, policies
from broker.secretfiles import write_secret
from broker.settings import listed

__all__ = ["setup"]

ADMINISTRATOR = "administrator"


def setup(
    *,
    config: ConfigOption = None,
    broker: BrokerOption = None,
    vhost: VhostOption = VHOST,
    worker: Annotated[
        list[str] | None, typer.Option("--worker", help="A worker's name; repeatable, or several with commas.")
    ] = None,
    aggregator: Annotated[str, typer.Option("--aggregator", help="The aggregator's account.")] = "aggregator",
    monitor: Annotated[str, typer.Option("--monitor", help="Who only looks.")] = "monitor",
    operator: Annotated[str, typer.Option("--operator", help="Who commands, and reads dead letters.")] = "operator",
    folder: FolderOption = None,
    address: AddressOption = None,
    by_certificate: CertificateOption = False,
    definitions_file: Annotated[
        Path | None,
        typer.Option("--definitions", help="Write a file that RabbitMQ imports, instead of asking a broker."),
    ] = None,
    max_connections: Annotated[
        int, typer.Option("--max-connections", min=10, help="Of the virtual host.")
    ] = MAX_CONNECTIONS,
    max_queues: Annotated[int, typer.Option("--max-queues", min=10, help="Of the virtual host.")] = MAX_QUEUES,
    update_bytes: Annotated[
        int, typer.Option("--update-bytes", min=1_000, help="What may wait for an aggregator, of each run.")
    ] = UPDATE_BYTES,
    dead_bytes: Annotated[int, typer.Option("--dead-bytes", min=1_000, help="Dead letters, of each run.")] = DEAD_BYTES,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Make a federation's virtual host: accounts with least rights, limits, policies. Again, it changes nothing.

    Asks the management API, as the administrator of broker.url. Accounts that are there keep their passwords. Addresses
    for the new ones are written into --folder, or shown once.

    Example: fedmq broker setup --worker w1,w2 --folder accounts --set broker.url_file=admin.url
    """
    with broker_command(config, None, broker, settings, verbose) as read:
        workers = dict.fromkeys(name for text in worker or () for name in listed(text))
        federation = Federation(
            vhost,
            (
                Account(aggregator, "aggregator"),
                Account(monitor, "monitor"),
                Account(operator, "operator"),
                *(Account(name, "worker") for name in workers),
            ),
            policies=policies(update_bytes=update_bytes, dead_bytes=dead_bytes),
            max_connections=max_connections,
            max_queues=max_queues,
        )
        addresses = addresses_of(read.broker, vhost, address=address, folder=folder, by_certificate=by_certificate)
        if definitions_file is None:
            _ask(Admin.of(read.broker), federation, addresses, by_certificate=by_certificate)
        else:
            _write(definitions_file, federation, addresses, by_certificate=by_certificate)
        if operator != "operator":
            remark(f"for the aggregator's settings: aggregator.trusted_users = [{operator!r}]")


def _ask(admin: Admin, federation: Federation, addresses: Addresses, *, by_certificate: bool) -> None:
    shown: list[str] = []

    def password_for(account: Account) -> str | None:
        # The file comes first: an account whose password nobody has is worse than a file too many.
        password = None if by_certificate else addresses.known(account.name) or new_password()
        _keep(addresses, account.name, password, shown)
        return password

    outcome = provision(admin, federation, password_for)
    for change in outcome.changes:
        say(change)
    for warning in outcome.warnings:
        remark(f"warning: {warning}")
    _show(shown)
    if not outcome.changes:
        say(f"nothing to change: virtual host {federation.vhost!r} has its {len(federation.accounts)} accounts")


def _write(file: Path, federation: Federation, addresses: Addresses, *, by_certificate: bool) -> None:
    if file.exists():
        raise ConfigError(f"--definitions {str(file)!r} exists already: remove it first, or name another file")
    shown: list[str] = []
    passwords: dict[str, str] = {}
    for name in [account.name for account in federation.accounts] + [ADMINISTRATOR]:
        is_by_certificate = by_certificate and name != ADMINISTRATOR
        password = None if is_by_certificate else addresses.known(name) or new_password()
        _keep(addresses, name, password, shown)
        if password is not None:
            passwords[name] = password
    content = definitions(federation, passwords, administrator=ADMINISTRATOR)
    write_secret(file, f"{json.dumps(content, indent=2)}\n".encode())
    say(f"wrote {file}: {len(content['users'])} accounts, {ADMINISTRATOR!r} among them, who makes further ones")
    _show(shown)
    remark(
        f"for a new broker: load_definitions = /path/to/{file.name} in its rabbitmq.conf, readable for its user; "
        f"for one that runs: rabbitmqctl import_definitions {file} (passwords of accounts in it are set anew)"
    )


def _keep(addresses: Addresses, name: str, password: str | None, shown: list[str]) -> None:
    text = addresses.keep(name, password)
    file = addresses.file(name)
    shown.append(text if file is None else str(file))


def _show(shown: list[str]) -> None:
    if shown:
        remark("the addresses, one for each machine (broker.url_file); they are not shown again:")
    for text in shown:
        say(text)
