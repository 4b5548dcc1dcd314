"""``fedmq broker``, also ``python -m broker``: look at a RabbitMQ before a run relies on it."""

from __future__ import annotations

import queue
import threading

import typer
from rich.console import Console

from broker.amqp.node import PrivateNode
from broker.amqp.transport import AmqpAggregatorTransport
from broker.console import (
    BrokerOption,
    ConfigOption,
    RunOption,
    SetOption,
    VerboseOption,
    broker_command,
    errors,
    guard,
    set_up_logging,
    stop_on_signals,
)
from broker.errors import BrokerError, BrokerUnreachable
from broker.settings import redacted
from broker.topology import Topology
from broker.transport import Failed, Incoming

__all__ = ["app", "check", "main", "node"]

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

    Example: fedmq broker check --run digits --broker amqp://user:password@host/
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


def node(*, verbose: VerboseOption = 0) -> None:
    """Run a private RabbitMQ node with its admin UI on free loopback ports, until Ctrl-C.

    For trying things out: all that it holds goes with it.

    Example: fedmq broker node
    """
    with guard():
        set_up_logging(verbose)
        stop = threading.Event()
        with stop_on_signals(stop), errors.status("starting a private RabbitMQ node"):
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
    help="Look at a RabbitMQ, or run a private one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("check")(check)
app.command("node")(node)


def main() -> None:
    """``python -m broker``."""
    app(prog_name="python -m broker")
