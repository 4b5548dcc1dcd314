"""What a link logs in with: read again for each attempt, so that a new password needs no new start."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pika

from broker.amqp.session import parameters
from broker.errors import AccessRefused, BrokerError, BrokerUnreachable, ConfigError
from broker.settings import BrokerConfig

__all__ = ["Login"]


class Login:
    """Addresses of the broker with user and password, from the settings or from ``broker.url_file``.

    A login that was good and is refused now may be on its way to be replaced: with a file it is tried again for
    ``broker.login_grace`` seconds, with what stands there then. One that was never good is a mistake.

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
        """Of each address; the former ones while the file is not there or is being written."""
        if self._config.url_file is not None:
            with contextlib.suppress(ConfigError):
                self._parameters = parameters(self._config, self._name)
        return self._parameters

    def accepted(self) -> None:
        """The broker has let us in."""
        self._was_good, self._refused_at = True, None

    def refused(self, error: AccessRefused) -> BrokerError:
        """What ``error`` comes to: itself, or an error that is worth trying again after."""
        if self._config.url_file is None or not self._was_good:
            return error
        now = self._clock()
        if self._refused_at is None:
            self._refused_at = now
        left = self._refused_at + self._config.login_grace - now
        if left <= 0:
            return error
        return BrokerUnreachable(f"{error}; broker.url_file is read again for another {left:.0f} s")
