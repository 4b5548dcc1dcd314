"""Who said it: which of the broker's accounts may speak in a worker's name.

RabbitMQ lets nobody set another ``user_id`` than the connection's own, so what stands there is true. That it stands
there at all, and that it fits the name in the message, is for the receiver to check
(https://www.rabbitmq.com/docs/validated-user-id).
"""

from __future__ import annotations

from dataclasses import dataclass

from broker.errors import ConfigError
from broker.messages import Reason

__all__ = ["NO_USER", "OPERATOR", "Senders"]

#: What the account of operators is called, unless the settings name others. No worker can be called so.
OPERATOR = "operator"

NO_USER = "it has no user id, so the broker vouches for nobody: it is of another client, or of an older release"


@dataclass(frozen=True, slots=True)
class Senders:
    """The accounts of a run: each worker has one of its own name."""

    own: str
    """The aggregator's. Whoever holds it can do all that could be done in a worker's name anyway; where aggregator and
    workers share one account, as on one's own machine, nobody can be told from anybody."""
    trusted: frozenset[str] = frozenset()
    """Those of operators, who publish dead letters again and give commands."""

    def refusal(self, user: str, worker: str) -> tuple[Reason, str] | None:
        """Why nothing is taken that ``user`` says in the name of ``worker``; None if it may."""
        if not user:
            return Reason.NO_USER, NO_USER
        if user == worker or self.speaks_for_all(user):
            return None
        detail = f"account {user!r} speaks in the name of {worker!r}: a worker's account is called as the worker"
        return Reason.WRONG_USER, f"{detail}, and an operator's stands in aggregator.trusted_users"

    def require_operator(self, user: str) -> None:
        """Raise :class:`ConfigError` if ``user`` may not say how the run goes.

        Workers have no right to the key of commands; but on RabbitMQ before 4.0.3 rights to keys do not cover the
        headers ``CC`` and ``BCC``, and not every broker is set up with rights for keys.
        """
        if user != OPERATOR and not self.speaks_for_all(user):
            raise ConfigError(
                f"account {user!r} may give no commands: {OPERATOR!r} may, the aggregator's own, and those in "
                "aggregator.trusted_users"
            )

    def blamed(self, user: str, said: str) -> str:
        """Who is to answer for a message of ``user`` that says it is from ``said``: never who was only named."""
        return said if self.speaks_for_all(user) else user

    def speaks_for_all(self, user: str) -> bool:
        """Whether ``user`` may say anything in any worker's name."""
        return user in self.trusted or (user == self.own and user != "")
