"""``fedmq broker``, also ``python -m broker``: look at a RabbitMQ before a run relies on it."""

from __future__ import annotations

import json
import queue
import threading
from typing import Annotated
from urllib.parse import quote

import typer
from rich.console import Console

from broker.accounts.addworker import add_worker
from broker.accounts.removeworker import remove_worker
from broker.accounts.rotate import rotate
from broker.accounts.setup import setup
from broker.accounts.users import users
from broker.admin import Admin
from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.certificatecommand import certificates
from broker.console import (
    BrokerOption,
    ConfigOption,
    JsonOption,
    RunOption,
    SetOption,
    VerboseOption,
    bar,
    broker_command,
    guard,
    say,
    set_up_logging,
    stop_on_signals,
)
from broker.errors import BrokerError, BrokerUnreachable
from broker.policies import DEAD_BYTES, UPDATE_BYTES
from broker.policies import policies as policies_of
from broker.redaction import redacted
from broker.topology import Topology
from broker.transport import Failed, Incoming

__all__ = ["app", "check", "main", "node", "policies"]

out = Console()


def check(
    *,
    config: ConfigOption = None,
    run: RunOption = None,
    broker: BrokerOption = None,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Connect as an aggregator would: version, credentials, permissions; declare the run's exchanges and queues.

    Takes no message from any queue but hellos and goodbyes that wait there. Run it before the aggregator.

    Example: fedmq broker check --run digits
    """
    with broker_command(config, run, broker, settings, verbose) as read:
        where = ", ".join(redacted(url) for url in read.broker.urls())
        inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        transport = AmqpAggregatorTransport(read.broker, Topology(read.run), model_bytes=0, prefetch=1)
        try:
            transport.open(inbox.put, wait=read.broker.connect_timeout + 5)
        except BrokerUnreachable as error:
            raise BrokerUnreachable(f"{error}; is RabbitMQ running there? (broker.url is {where})") from None
        finally:
            transport.close()
        while not inbox.empty():
            if isinstance(item := inbox.get(), Failed):
                raise item.error
        out.print(
            f"{where}: the exchanges and queues of run {read.run!r} are in place", highlight=False, soft_wrap=True
        )


def policies(
    *,
    config: ConfigOption = None,
    broker: BrokerOption = None,
    update_bytes: Annotated[
        int, typer.Option("--update-bytes", min=1_000, help="What may wait for an aggregator, of each run.")
    ] = UPDATE_BYTES,
    dead_bytes: Annotated[int, typer.Option("--dead-bytes", min=1_000, help="Dead letters, of each run.")] = DEAD_BYTES,
    apply: Annotated[bool, typer.Option("--apply", help="Set them, through the management API.")] = False,
    as_json: JsonOption = False,
    settings: SetOption = None,
    verbose: VerboseOption = 0,
) -> None:
    """Show, or set, policies that bound each run's backlog and dead letters, as commands or to be imported (--json).

    They are optional. A policy of the same name is replaced, others stay; RabbitMQ applies one to a queue, that of the
    highest priority. --apply needs a user with the tag 'policymaker' or 'administrator'.

    Example: fedmq broker policies --update-bytes 500000000 --apply
    """
    with broker_command(config, None, broker, settings, verbose) as read:
        chosen = policies_of(update_bytes=update_bytes, dead_bytes=dead_bytes)
        admin = Admin.of(read.broker)
        if apply:
            for policy in chosen:
                admin.put(f"/policies/{quote(admin.vhost, safe='')}/{policy.name}", policy.body())
        if as_json:
            say(json.dumps({"policies": [policy.entry(admin.vhost) for policy in chosen]}, indent=2))
            return
        for policy in chosen:
            if apply:
                say(f"set in virtual host {admin.vhost!r}: {policy.name} ({policy.why})")
            else:
                say(f"# {policy.why}\n{policy.command(admin.vhost)}")


def node(*, verbose: VerboseOption = 0) -> None:
    """Run a private RabbitMQ node with its admin UI on free loopback ports, until Ctrl-C.

    For trying things out: all that it holds goes with it.

    Example: fedmq broker node
    """
    with guard():
        set_up_logging(verbose)
        stop = threading.Event()
        with stop_on_signals(stop), bar("starting a private RabbitMQ node"):
            private = PrivateNode(plugins=("rabbitmq_management",))
            private.start()
        try:
            with stop_on_signals(stop):
                out.print(f"broker    {private.url}", highlight=False, soft_wrap=True)
                out.print(f"admin UI  {private.management_url}", highlight=False, soft_wrap=True)
                out.print(
                    f"          user {private.user}, password {private.password}; Ctrl-C ends it", highlight=False
                )
                while not stop.wait(0.5):
                    if not private.is_running:
                        raise BrokerError("the private RabbitMQ node has ended; its queues are gone with it")
        finally:
            private.stop()
            private.discard()


app = typer.Typer(
    help="Look at a RabbitMQ, set it up for a federation: accounts, certificates, policies; or run a private one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("certificates")(certificates)
app.command("check")(check)
app.command("node")(node)
app.command("policies")(policies)
app.command("setup")(setup)
app.command("add-worker")(add_worker)
app.command("rotate")(rotate)
app.command("remove-worker")(remove_worker)
app.command("users")(users)


def main() -> None:
    """``python -m broker``."""
    app(prog_name="python -m broker")
