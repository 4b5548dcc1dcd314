"""What an aggregator signs, and whose signatures it asks for."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from aggregator.config import AggregatorConfig
from broker.errors import ConfigError, WireError
from broker.messages import Command
from broker.seldom import Seldom
from broker.signing import COMMAND, CONTROL, EVENT, UPDATE, VERSION, Keyring, Signer
from broker.transport import Delivery, Source, order_of
from broker.wire import order_in

__all__ = ["Signatures"]

#: How old a signed command may be.
COMMAND_SECONDS = 86_400.0

log = logging.getLogger("fedmq.aggregator")


@dataclass(frozen=True, slots=True)
class Signatures:
    """Of one run. Without keys of workers or operators, theirs are not looked at."""

    signer: Signer | None = None
    """For versions, notices and events."""
    workers: Keyring | None = None
    operators: Keyring | None = None
    _seldom: Seldom = field(default_factory=Seldom)

    @classmethod
    def load(cls, config: AggregatorConfig, run: str) -> Signatures:
        """As the settings say. Raises :class:`ConfigError` for a file that cannot be used."""
        return cls(
            Signer.load(config.signing_key_file, run, "aggregator.signing_key_file"),
            Keyring.load(config.worker_keys_file, run, "aggregator.worker_keys_file"),
            Keyring.load(config.operator_keys_file, run, "aggregator.operator_keys_file"),
        )

    def is_own(self, delivery: Delivery) -> bool:
        """Whether a version that is on the broker was made with this key; if nothing is signed, all are believed."""
        if self.signer is None:
            return True
        try:
            self.signer.require_own(delivery.body, VERSION)
            return order_in(delivery.body) == order_of(delivery.headers)
        except WireError as error:
            log.warning("a version on the broker is left aside: %s", error)
            return False

    def of_update(self, body: bytes) -> frozenset[str] | None:
        """The workers that have signed the update ``body``; None if that is not asked for.

        Raises :class:`NotSigned`, :class:`BadSignature`, or :class:`WireError` for what is no message.
        """
        return None if self.workers is None else self.workers.speakers(body, UPDATE)

    def believes(self, delivery: Delivery, worker: str) -> bool:
        """Whether what is no update is said by ``worker``, if that is asked for. The log says seldom that it is not."""
        if self.workers is None:
            return True
        try:
            if worker in self.workers.speakers(delivery.body, CONTROL if delivery.source is Source.CONTROL else EVENT):
                return True
            problem = "somebody else has signed it"
        except WireError as error:
            problem = str(error)
        if self._seldom.may(problem):
            log.warning("what somebody says in the name of %s is ignored: %s", worker, problem)
        return False

    def require_command(self, command: Command, body: bytes, now: float) -> None:
        """Raise :class:`ConfigError` if ``command``, whose ``body`` this is, bears no operator's signature of today.

        That it was executed before is not remembered for ever. Nothing is raised if no signature is asked for.
        """
        if self.operators is None:
            return
        try:
            self.operators.speakers(body, COMMAND)
        except WireError as error:
            raise ConfigError(f"{error}; give the command with --key") from None
        if abs(now - command.time) > COMMAND_SECONDS:
            hours = (now - command.time) / 3600
            raise ConfigError(f"it was signed {hours:.0f} hours ago, by the clocks of both machines; give it once more")
