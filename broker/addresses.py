"""Addresses of a broker, ``amqp://user:password@host:5672/vhost``: what is one, and whether it holds a password."""

from __future__ import annotations

from ipaddress import ip_address
from urllib.parse import unquote, urlsplit

from broker.errors import ConfigError
from broker.redaction import conceal, redacted

__all__ = ["addresses_of", "check_guest", "holds_password", "is_loopback"]

_LIKE = "it is like amqp://user:password@host:5672/vhost"
#: What ends the part of an address that holds the password.
_ENDS = "/?#"


def addresses_of(text: str) -> tuple[str, ...]:
    """The addresses in ``text``, which are separated by commas.

    Raises :class:`ConfigError` for what is no address, without showing any of it. That includes a password that was
    not percent-encoded and would be taken for a host, a port or a virtual host, and so come out in messages.
    """
    urls = tuple(part.strip() for part in text.split(",") if part.strip())
    if not urls:
        raise ConfigError(f"broker.url is empty: {_LIKE}")
    if not all(url.startswith(("amqp://", "amqps://")) for url in urls):
        hint = "" if len(urls) == 1 else "; a comma within a password or a virtual host is written as %2C"
        raise ConfigError(f"broker.url: an address begins with amqp:// or amqps://{hint}")
    for url in urls:
        _check(url)
    return urls


def holds_password(text: str) -> bool:
    """Whether there is a password in ``text``, an address or several, other than that of RabbitMQ's ``guest``."""
    rest = text.replace("://guest:guest@", "://")
    return redacted(rest) != rest


def _check(url: str) -> None:
    _, _, rest = url.partition("://")
    authority = rest[: min((place for end in _ENDS if (place := rest.find(end)) >= 0), default=len(rest))]
    if "@" in rest[len(authority) :]:
        raise ConfigError(
            f"broker.url: there is an @ behind the host. {_LIKE}; in a password, / is written as %2F, ? as %3F, # as "
            "%23, and in a virtual host @ as %40"
        )
    try:
        parts = urlsplit(url)
        is_sound = parts.port != 0
    except ValueError:
        # Not the exception's text: it may hold the password.
        is_sound = False
    if not is_sound or any(not character.isprintable() for character in url):
        raise ConfigError(f"broker.url: {_LIKE}, the port is a number, and what is special is written like %2F")
    check_guest(parts.username, parts.hostname)
    conceal(parts.password or "", unquote(parts.username or ""))


def check_guest(user: str | None, host: str | None) -> None:
    """Raises :class:`ConfigError` if that is RabbitMQ's well-known account, and a network lies between."""
    if user == "guest" and not is_loopback(host or "localhost"):
        raise ConfigError(
            "broker.url: the user 'guest' is for RabbitMQ's own machine alone, since everybody knows its password; who "
            "names no user is 'guest', too. fedmq broker setup makes accounts, as does rabbitmqctl add_user"
        )


def is_loopback(host: str) -> bool:
    """Whether this host of an address is this machine, and no network lies between."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False
