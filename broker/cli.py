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
    errors,
    guard,
    parse_flags,
    set_up_logging,
    stop_on_signals,
)
from broker.errors import BrokerUnreachable
from broker.settings import load, redacted
from broker.topology import Topology
from broker.transport import Connected, Failed, Incoming

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
    """
    with guard():
        set_up_logging(verbose)
        read = load({}, file=config, flags=parse_flags(settings or [], run=run, broker__url=broker))
        where = ", ".join(redacted(url) for url in read.broker.urls())
        inbox: queue.SimpleQueue[Incoming] = queue.SimpleQueue()
        transport = AmqpAggregatorTransport(read.broker, Topology(read.run), model_bytes=0, prefetch=1)
        try:
            transport.open(inbox.put)
            item = inbox.get(timeout=read.broker.connect_timeout + 5)
        except queue.Empty:
            raise BrokerUnreachable(f"no connection to {where}: is RabbitMQ running there?") from None
        finally:
            transport.close()
        if isinstance(item, Failed):
            raise item.error
        if isinstance(item, Connected):
            out.print(f"{where}: the exchanges and queues of run {read.run!r} are in place", highlight=False)


def node(*, verbose: VerboseOption = 0) -> None:
    """Run a private RabbitMQ node with its admin UI on free loopback ports, until Ctrl-C."""
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
                stop.wait()
        finally:
            private.stop()
            private.discard()


app = typer.Typer(help="Look at a RabbitMQ, or run a private one.", no_args_is_help=True, add_completion=False)
app.command("check")(check)
app.command("node")(node)


def main() -> None:
    """``python -m broker``."""
    app(prog_name="python -m broker")
