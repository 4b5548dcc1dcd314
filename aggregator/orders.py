"""What an operator's command asks of the round machine, if it may ask that."""

from __future__ import annotations

from aggregator.config import AggregatorConfig
from aggregator.core import events as on
from aggregator.core.controls import Order
from aggregator.core.machine import RoundMachine
from aggregator.senders import Senders
from aggregator.signatures import Signatures
from broker.messages import Action, Command
from broker.transport import Delivery

__all__ = ["ordered"]


def ordered(
    command: Command,
    delivery: Delivery,
    machine: RoundMachine,
    config: AggregatorConfig,
    *,
    senders: Senders,
    signatures: Signatures,
    now: float,
) -> on.Ordered:
    """The event for ``command``, which came in ``delivery``.

    Args:
        command: what is asked for.
        delivery: how it came.
        machine: of the run.
        config: the settings of the run's file.
        senders: whose commands are executed, by the broker's word.
        signatures: the same by their own.
        now: seconds since 1970.

    Raises :class:`ConfigError` for a command that is not executed: it is of no operator's account, no operator has
    signed it, or its settings are none.
    """
    assert delivery.token is not None  # noqa: S101  (the caller has looked)
    senders.require_operator(delivery.user)
    signatures.require_command(command, delivery.body, now)
    order = None
    if command.action is Action.SET and not machine.controls.knows(command.id):
        changes = config.normal({**machine.controls.newest, **command.changes})
        order = Order(changes, config.changed(changes).rules(machine.model.nbytes))
    worker = str(command.changes.get("worker", "")) if command.action is Action.RELEASE else ""
    return on.Ordered(delivery.token, command.id, command.action, order, worker)
