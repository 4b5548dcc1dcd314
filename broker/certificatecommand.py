"""``fedmq broker certificates``: TLS for a federation that has no certificate authority."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from broker.certificates import CLIENT_DAYS, Authority, check_account, host_of, require_free
from broker.console import VerboseOption, guard, say, set_up_logging
from broker.errors import ConfigError

__all__ = ["certificates"]

#: What the lines for rabbitmq.conf call the folder on the broker's machine.
THERE = "/etc/rabbitmq/tls"


def certificates(
    *,
    folder: Annotated[Path, typer.Option("--folder", help="Where they are written; more are added to what is there.")],
    broker_host: Annotated[
        list[str] | None,
        typer.Option("--broker-host", help="A name or address that the broker is reached by. Repeatable."),
    ] = None,
    worker: Annotated[
        list[str] | None, typer.Option("--worker", help="A worker, by its name, or any other account. Repeatable.")
    ] = None,
    days: Annotated[
        float, typer.Option("--days", min=0.01, max=3650, help="How long they are valid; the CA itself: ten years.")
    ] = CLIENT_DAYS,
    verbose: VerboseOption = 0,
) -> None:
    """Make a small certificate authority, the broker's certificate and those of workers, or add more of them.

    Nothing is overwritten. Keep ca.key away from the broker and the workers: whoever has it can be anybody.

    Example: fedmq broker certificates --folder tls --broker-host mq.example.org --worker aggregator --worker w1
    """
    with guard():
        set_up_logging(verbose)
        hosts, names = [host_of(host) for host in broker_host or ()], list(worker or ())
        if not hosts and not names:
            raise ConfigError("nothing to make: name the broker's host (--broker-host) or a worker (--worker)")
        if len(set(names)) < len(names):
            raise ConfigError("a worker is named twice")
        for name in names:
            check_account(name)
        for name in (*names, *(["broker"] if hosts else [])):
            # Before anything is made: half of what was wanted would be in the way of the next attempt.
            require_free(folder, name)
        is_new = not (folder / "ca.pem").exists()
        authority = Authority.new(folder) if is_new else Authority.load(folder)
        if is_new:
            say(f"{folder / 'ca.pem'}  the CA: for the broker and all who connect to it (broker.ca_file)")
            say(f"{folder / 'ca.key'}  its key: for nobody")
        if hosts:
            made, key = authority.server(hosts, days=days)
            say(f"{made}, {key}  for the broker: {', '.join(hosts)}")
        for name in names:
            made, key = authority.client(name, days=days)
            say(f"{made}, {key}  for {name} (broker.certificate_file, broker.key_file)")
        if hosts:
            say("")
            say("\n".join(lines_of()))


def lines_of(there: str = THERE) -> tuple[str, ...]:
    """What goes into ``rabbitmq.conf`` on the broker's machine, where the files lie in ``there``."""
    return (
        "# rabbitmq.conf; before: rabbitmq-plugins enable rabbitmq_auth_mechanism_ssl",
        "listeners.tcp = none",
        "listeners.ssl.default = 5671",
        f"ssl_options.cacertfile = {there}/ca.pem",
        f"ssl_options.certfile = {there}/broker.pem",
        f"ssl_options.keyfile = {there}/broker.key",
        "ssl_options.versions.1 = tlsv1.3",
        "ssl_options.versions.2 = tlsv1.2",
        "ssl_options.verify = verify_peer",
        "ssl_options.fail_if_no_peer_cert = true",
        "ssl_cert_login_from = common_name",
        "auth_mechanisms.1 = EXTERNAL",
        "management.ssl.port = 15671",
        f"management.ssl.cacertfile = {there}/ca.pem",
        f"management.ssl.certfile = {there}/broker.pem",
        f"management.ssl.keyfile = {there}/broker.key",
    )
