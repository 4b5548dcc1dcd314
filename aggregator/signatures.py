"""What an aggregator signs, and whose signatures it asks for."""

from __future__ import annotations

from dataclasses import dataclass

from aggregator.config import AggregatorConfig
from broker.errors import BadSignature, ConfigError, WireError
from broker.signing import COMMAND, CONTROL, EVENT, UPDATE, Keyring, Signer
from broker.transport import Delivery, Source

__all__ = ["Signatures"]


@dataclass(frozen=True, slots=True)
class Signatures:
    """Of one run. Without keys of workers or operators, theirs are not looked at."""

    signer: Signer | None = None
    """For versions, notices and events."""
    workers: Keyring | None = None
    operators: Keyring | None = None

    @classmethod
    def load(cls, config: AggregatorConfig, run: str) -> Signatures:
        """As the settings say. Raises :class:`ConfigError` for a file that cannot be used."""
        return cls(
            Signer.load(config.signing_key_file, run, "aggregator.signing_key_file"),
            Keyring.load(config.worker_keys_file, run, "aggregator.worker_keys_file"),
            Keyring.load(config.operator_keys_file, run, "aggregator.operator_keys_file"),
        )

    def of_update(self, body: bytes) -> frozenset[str] | None:
        """The workers that have signed the update ``body``; None if that is not asked for.

        Raises :class:`NotSigned`, :class:`BadSignature`, or :class:`WireError` for what is no message.
        """
        return None if self.workers is None else self.workers.speakers(body, UPDATE)

    def require_aside(self, delivery: Delivery, worker: str) -> None:
        """Raise :class:`WireError` if what is no update is not said by ``worker``, as far as that is asked for."""
        if self.workers is None:
            return
        purpose = CONTROL if delivery.source is Source.CONTROL else EVENT
        if worker not in self.workers.speakers(delivery.body, purpose):
            raise BadSignature(f"somebody else than {worker} has signed it")

    def require_command(self, body: bytes) -> None:
        """Raise :class:`ConfigError` if no operator has signed the command ``body``, and that is asked for."""
        if self.operators is None:
            return
        try:
            self.operators.speakers(body, COMMAND)
        except WireError as error:
            raise ConfigError(f"{error}; give the command with --key") from None
