"""What a link logs in with: read again for each attempt, so that a new password needs no new start."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pika

from broker.amqp.credentials import parameters
from broker.errors import AccessRefused, BrokerError, BrokerUnreachable, ConfigError
from broker.settings import BrokerConfig

__all__ = ["Login"]


class Login:
    """Addresses of the broker with user and password, from the settings or from files; certificate, token.

    A login that was good and is refused now may be on its way to be replaced: with a file of an address or a token it
    is tried again for ``broker.login_grace`` seconds, with what stands there then. One that was never good is an error.

    Args:
        config: the table ``[broker]``.
        name: what the admin UI shows as the connection's name.
        clock: for tests.
    """

    def __init__(self, config: BrokerConfig, name: str, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Raises :class:`ConfigError` for addresses that cannot be read."""
        self._config = config
        self._name = name
        self._clock = clock
        self._parameters = parameters(config, name)
        self._was_good = False
        self._refused_at: float | None = None

    def parameters(self) -> list[pika.URLParameters]:
        """Of each address; the former ones while a file is not there or is being written."""
        with contextlib.suppress(ConfigError):
            self._parameters = parameters(self._config, self._name)
        return self._parameters

    def accepted(self) -> None:
        """The broker has let us in."""
        self._was_good, self._refused_at = True, None

    def refused(self, error: AccessRefused) -> BrokerError:
        """What ``error`` comes to: itself, or an error that is worth trying again after."""
        file = "url_file" if self._config.url_file is not None else "token_file"
        if (self._config.url_file is None and self._config.token_file is None) or not self._was_good:
            return error
        now = self._clock()
        if self._refused_at is None:
            self._refused_at = now
        left = self._refused_at + self._config.login_grace - now
        if left <= 0:
            return error
        return BrokerUnreachable(f"{error}; broker.{file} is read again for another {left:.0f} s")
