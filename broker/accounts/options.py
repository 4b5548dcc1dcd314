"""What the commands for accounts share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from broker.accounts.addresses import Addresses, leads_here
from broker.accounts.provision import quoted
from broker.admin import Admin
from broker.console import errors
from broker.errors import BrokerError
from broker.settings import BrokerConfig

__all__ = ["AddressOption", "CertificateOption", "FolderOption", "VhostOption", "accounts_of", "addresses_of", "remark"]

VhostOption = Annotated[str, typer.Option("--vhost", help="The federation's virtual host.")]
FolderOption = Annotated[
    Path | None, typer.Option("--folder", help="Write addresses into this folder, a file an account, mode 0600.")
]
AddressOption = Annotated[
    str | None,
    typer.Option("--address", help="Where clients find the broker: amqps://host:5671; if not given, as you do."),
]
CertificateOption = Annotated[
    bool, typer.Option("--by-certificate", help="No password: the account logs in by a certificate with its name.")
]


def addresses_of(
    config: BrokerConfig, vhost: str, *, address: str | None, folder: Path | None, by_certificate: bool = False
) -> Addresses:
    """Where addresses go, and which they are. Says so if they lead nowhere from another machine."""
    places = address or ",".join(config.urls())
    if address is None and leads_here(places):
        remark("the addresses below lead to this machine: from others, --address says where the broker is")
    return Addresses(places, vhost, folder=folder, by_certificate=by_certificate)


def accounts_of(admin: Admin, vhost: str) -> dict[str, dict[str, str]]:
    """The permissions in a virtual host, by account; :class:`BrokerError` if it is not there."""
    if vhost not in {row["name"] for row in admin.listed("/vhosts")}:
        raise BrokerError(f"there is no virtual host {vhost!r} at {admin.url}: fedmq broker setup --vhost makes it")
    return {str(row["user"]): row for row in admin.listed(f"/vhosts/{quoted(vhost)}/permissions")}


def remark(text: str) -> None:
    """A line beside the command's result, which may go into a pipe."""
    errors.print(text, highlight=False, markup=False, soft_wrap=True)
