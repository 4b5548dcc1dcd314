"""How fedmq logs in: with a password, a certificate or a token; and over what kind of line."""

from __future__ import annotations

import logging
import platform
import ssl
from importlib import metadata
from urllib.parse import parse_qsl, unquote, urlsplit, urlunsplit

import pika
from pika.credentials import ExternalCredentials, PlainCredentials

from broker.addresses import check_guest, is_loopback
from broker.errors import ConfigError
from broker.settings import BrokerConfig
from broker.tls import client_context, common_name
from broker.tokens import Token, read_token

__all__ = ["Address", "Certified", "TokenBearer", "account_of", "parameters"]

log = logging.getLogger("fedmq.broker")

#: Hosts of which was said already that all can be read on the way to them.
_warned: set[str] = set()


class Address(pika.URLParameters):  # type: ignore[misc]
    """One address, and by which file of CAs it is trusted."""

    ca_file = ""


class Certified(ExternalCredentials):  # type: ignore[misc]
    """The login is the certificate. ``username`` is what RabbitMQ takes from it."""

    def __init__(self, username: str) -> None:
        super().__init__()
        self.username = username


class TokenBearer(PlainCredentials):  # type: ignore[misc]
    """The password is a token. RabbitMQ takes the account from it, unless ``is_named`` says that we know better."""

    def __init__(self, token: Token, username: str, *, is_named: bool) -> None:
        super().__init__(username, token.text)
        self.token = token
        self.is_named = is_named

    def account(self, version: tuple[int, ...]) -> str:
        """The account at a RabbitMQ of this version."""
        return str(self.username) if self.is_named else self.token.account(version)


def account_of(config: BrokerConfig) -> str:
    """The account that ``config`` logs in as at its first address.

    Raises :class:`ConfigError` as :func:`parameters`.
    """
    return str(parameters(config, "")[0].credentials.username)


def parameters(config: BrokerConfig, name: str) -> list[Address]:
    """The connection parameters for each address of ``config``; ``name`` is what the admin UI shows.

    Files are read anew each time, since tokens and certificates are renewed.

    Raises :class:`ConfigError` for an address that cannot be read, a file that cannot be used, or a plain connection
    to another machine that ``broker.allow_plain`` does not allow.
    """
    urls = config.urls()
    is_secure = any(url.startswith("amqps://") for url in urls)
    if config.certificate_file is not None and not is_secure:
        raise ConfigError("broker.certificate_file needs TLS: broker.url must begin with amqps://")
    if config.key_password_file is not None and config.key_file is None:
        raise ConfigError("broker.key_password_file is set and broker.key_file is not")
    if config.token_file is not None and any(urlsplit(url).password is not None for url in urls):
        raise ConfigError("broker.url names a password, and broker.token_file is one, too: leave one of them away")
    context = _context(config) if is_secure else None
    token = None if config.token_file is None else read_token(config.token_file)
    return [_parameters(url, config, name, context, token) for url in urls]


def _context(config: BrokerConfig) -> ssl.SSLContext:
    return client_context(
        ca_file=config.ca_file,
        certificate_file=config.certificate_file,
        key_file=config.key_file,
        key_password_file=config.key_password_file,
    )


def _parameters(
    url: str, config: BrokerConfig, name: str, context: ssl.SSLContext | None, token: Token | None
) -> Address:
    parts = urlsplit(url)
    if any(key == "ssl_options" for key, _ in parse_qsl(parts.query, keep_blank_values=True)):
        raise ConfigError("broker.url: no ssl_options there; broker.ca_file, certificate_file and key_file say it")
    user = None if parts.username is None else unquote(parts.username)
    credentials = _credentials(config, user, has_password=parts.password is not None, scheme=parts.scheme, token=token)
    if credentials is not None:
        url = urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    try:
        one = Address(url)
    except (ValueError, TypeError, IndexError):
        # Not the exception's text: it may hold the password.
        raise ConfigError("broker.url: it is like amqp://user:password@host:5672/vhost") from None
    if credentials is None:
        check_guest(one.credentials.username, one.host)
    else:
        one.credentials = credentials
    if parts.scheme == "amqps":
        one.ssl_options = pika.SSLOptions(context, one.host)
        one.ca_file = "" if config.ca_file is None else str(config.ca_file)
    elif not is_loopback(one.host):
        _allow_plain(one.host, config)
    one.heartbeat = config.heartbeat
    one.blocked_connection_timeout = config.blocked_timeout
    one.socket_timeout = config.connect_timeout
    one.stack_timeout = config.connect_timeout
    one.connection_attempts = 1
    one.client_properties = {
        "connection_name": name,
        "product": "fedmq",
        "version": _own_version(),
        "platform": f"Python {platform.python_version()}",
        "information": f"pika {pika.__version__}",
    }
    return one


def _credentials(
    config: BrokerConfig, user: str | None, *, has_password: bool, scheme: str, token: Token | None
) -> Certified | TokenBearer | None:
    """How to log in, if not with the address's own user and password."""
    if token is not None:
        account = user or token.account()
        if not account:
            raise ConfigError(
                "broker.token_file: the token says neither sub nor client_id, so name the account in broker.url: "
                "amqps://account@host/"
            )
        return TokenBearer(token, account, is_named=user is not None)
    if config.certificate_file is None or has_password or scheme != "amqps":
        return None
    account = common_name(config.certificate_file, "broker.certificate_file")
    what = f"broker.certificate_file = {str(config.certificate_file)!r}"
    if not account:
        raise ConfigError(f"{what}: has no common name, which would be the account at the broker")
    if user is not None and user != account:
        raise ConfigError(
            f"broker.url names account {user!r}, and {what} is that of {account!r}: name none in broker.url"
        )
    return Certified(account)


def _allow_plain(host: str, config: BrokerConfig) -> None:
    if not config.allow_plain:
        raise ConfigError(
            f"broker.url leads to {host} without TLS, where passwords and models can be read and altered on the way: "
            "write amqps:// (docs/tls.md), or, where the network is trusted, set broker.allow_plain = true"
        )
    if host not in _warned:
        _warned.add(host)
        log.warning("speaking to %s without TLS, as broker.allow_plain allows: all can be read on the way", host)


def _own_version() -> str:
    try:
        return metadata.version("fedmq")
    except metadata.PackageNotFoundError:
        return "0+source"
