"""The one place where pika's exceptions and RabbitMQ's reply codes become errors of ours."""

from __future__ import annotations

import re
import ssl
import time
from dataclasses import dataclass
from typing import Literal

import pika
import pika.exceptions

from broker.amqp.credentials import Certified, TokenBearer
from broker.errors import (
    AccessRefused,
    BrokerError,
    BrokerUnreachable,
    ConnectionLost,
    MessageTooLarge,
    TopologyMismatch,
    Unroutable,
    UnsupportedBroker,
    Untrusted,
)
from broker.tls import complaint, of_reason

__all__ = ["FATAL", "Inequivalent", "Operation", "Place", "channel_error", "connection_error", "limit_of", "verdict"]

#: What no waiting will cure.
FATAL = (AccessRefused, TopologyMismatch, UnsupportedBroker, Untrusted)

#: By which another machine's clock may differ from ours.
CLOCK_SECONDS = 2.0

#: What to do if the broker has not switched on what we log in with.
_NO_WAY_IN = {
    "password": " (auth_mechanisms.1 = PLAIN in its rabbitmq.conf)",
    "token": " (auth_mechanisms.1 = PLAIN in its rabbitmq.conf)",
    "certificate": " (rabbitmq-plugins enable rabbitmq_auth_mechanism_ssl, auth_mechanisms.1 = EXTERNAL)",
}

RESOURCE_LIMITS = ("connection limit", "channel limit", "is down")
# Arguments in which our classic and quorum queues differ. RabbitMQ names the first that it meets.
OF_THE_TYPE = {"x-queue-type", "x-overflow", "x-dead-letter-strategy", "x-delivery-limit"}
INEQUIVALENT = re.compile(r"inequivalent arg '([^']+)' for (\w+) '([^']+)'.*?: (received .*)")
CURRENT_NUMBER = re.compile(r"current is (?:the value )?'(\d+)'")
TOO_LARGE = re.compile(r"message size \d+ is larger than (?:configured )?max size (\d+)")
NO_EXCHANGE = re.compile(r"no exchange '([^']+)'")
SYSTEM_ERROR = re.compile(r"\w+[Ee]rror\(-?\d+, ['\"]([^'\"]+)['\"]\)")
# Of a queue that is there: a node that starts takes connections before it has all its queues.
NOT_YET = "is down or inaccessible"
SSL_REASON = re.compile(r"\[SSL: (\w+)\]")
NAMED_RIGHT = re.compile(r"- (configure|write|read) access")


@dataclass(frozen=True, slots=True)
class Place:
    """Where a connection goes to, in words that may be shown: never the password."""

    address: str
    vhost: str
    user: str
    login: Literal["password", "certificate", "token"] = "password"
    expires: float | None = None
    """Of a token: seconds since 1970."""
    is_encrypted: bool = False
    ca_file: str = ""
    """By which it is trusted; empty for the system's."""

    @classmethod
    def of(cls, parameters: pika.ConnectionParameters) -> Place:
        """The place that ``parameters`` lead to."""
        credentials = parameters.credentials
        return cls(
            address=f"{parameters.host}:{parameters.port}",
            vhost=parameters.virtual_host,
            user=str(credentials.username),
            login=_login_of(credentials),
            expires=credentials.token.expires if isinstance(credentials, TokenBearer) else None,
            is_encrypted=parameters.ssl_options is not None,
            ca_file=getattr(parameters, "ca_file", ""),
        )

    @property
    def host(self) -> str:
        """Without the port."""
        return self.address.rpartition(":")[0]

    @property
    def has_expired(self) -> bool:
        """Whether the token that the connection was made with has."""
        return self.expires is not None and time.time() >= self.expires - CLOCK_SECONDS


@dataclass(frozen=True, slots=True)
class Operation:
    """What a channel was doing, and which of the user's permissions it needs on what."""

    name: str
    right: str = "write"


class Inequivalent(TopologyMismatch):
    """An existing queue or exchange has another value of ``argument``: ``current``, if that is a number."""

    def __init__(self, message: str, argument: str, current: int | None = None) -> None:
        super().__init__(message)
        self.argument = argument
        self.current = current


def connection_error(error: BaseException, place: Place, *, opened: bool) -> BrokerError:
    """Why a connection could not be made, or broke."""
    text = _text(error)
    if not opened:
        cause = _cause(error)
        if isinstance(cause, ssl.SSLError):
            return _not_encrypted(cause, place)
        return _login_refused(error, text, place) or _unreachable(_innermost(text), place)
    return ConnectionLost(f"the connection to {place.address} broke: {text}")


def _cause(error: BaseException) -> BaseException:
    """What pika has wrapped, up to three times."""
    for _ in range(8):
        inner = [*getattr(error, "exceptions", ()), getattr(error, "exception", None), *reversed(error.args)]
        found = next((one for one in inner if isinstance(one, BaseException)), None)
        if found is None:
            break
        error = found
    return error


def _unreachable(text: str, place: Place) -> BrokerError:
    if place.is_encrypted and (alert := SSL_REASON.search(text)):
        # With TLS 1.3 a server looks at our certificate when the handshake is over for us.
        return _verdict_on_tls(place, of_reason(alert.group(1)))
    hint = ""
    if not place.is_encrypted and ("reset by peer" in text or "Incompatible" in text):
        hint = " (a port for TLS? then broker.url begins with amqps://)"
    return BrokerUnreachable(f"{place.address}{hint}: {text}")


def _verdict_on_tls(place: Place, verdict: tuple[str, bool]) -> BrokerError:
    words, is_passing = verdict
    return (BrokerUnreachable if is_passing else Untrusted)(f"{place.address}: {words}")


def _not_encrypted(error: ssl.SSLError, place: Place) -> BrokerError:
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        # As a broker does that is being stopped.
        return BrokerUnreachable(f"{place.address} hung up in the TLS handshake")
    return _verdict_on_tls(place, complaint(error, place.host, ca_file=place.ca_file))


def _login_of(credentials: object) -> Literal["password", "certificate", "token"]:
    if isinstance(credentials, TokenBearer):
        return "token"
    return "certificate" if isinstance(credentials, Certified) else "password"


def _login_refused(error: BaseException, text: str, place: Place) -> BrokerError | None:
    # pika guesses "probable authentication error" from the moment at which a connection ended, which a broker
    # that is being stopped brings about as well; only the broker's own reply code counts here.
    if isinstance(error, pika.exceptions.AuthenticationError):
        advice = _NO_WAY_IN[place.login]
        return UnsupportedBroker(f"{place.address} offers no way to log in that fedmq knows{advice}: {text}")
    if isinstance(error, pika.exceptions.ProbableAuthenticationError) and "(403)" in text:
        return _wrong_login(place)
    limited = any(limit in text for limit in RESOURCE_LIMITS)
    if limited or not isinstance(error, pika.exceptions.ProbableAccessDeniedError) or "(530)" not in text:
        return None
    if "not found" in text:
        return AccessRefused(
            f"there is no virtual host {place.vhost!r} on {place.address}: create it "
            f"(rabbitmqctl add_vhost {place.vhost}) or correct the end of broker.url"
        )
    return AccessRefused(
        f"user {place.user!r} may not use virtual host {place.vhost!r} on {place.address}: give permissions "
        f"(rabbitmqctl set_permissions -p {place.vhost} {place.user} …)"
    )


def _wrong_login(place: Place) -> BrokerError:
    if place.has_expired:
        return BrokerUnreachable(
            f"{place.address}: the token in broker.token_file has expired, and whatever renews it has not done so"
        )
    advice = {
        "password": "check user and password in broker.url (RabbitMQ accepts the user 'guest' from its own machine "
        "only)",
        "certificate": "that is the name in broker.certificate_file, and it must be an account there (rabbitmqctl "
        f"add_user {place.user} …)",
        "token": "the signature, audience and scopes of the token in broker.token_file must be what the broker's "
        "rabbitmq_auth_backend_oauth2 was told; its log says what it does not like",
    }
    return AccessRefused(f"{place.address} refused the login of user {place.user!r}: {advice[place.login]}")


def channel_error(error: BaseException, place: Place, operation: Operation) -> BrokerError:
    """Why a channel was closed."""
    if not isinstance(error, pika.exceptions.ChannelClosedByBroker):
        return connection_error(error, place, opened=True)
    text = error.reply_text
    if error.reply_code == 403:
        return _not_allowed(text, place, operation)
    if error.reply_code == 404:
        return _absent(text, place)
    if match := INEQUIVALENT.search(text):
        argument, kind, name, values = match.groups()
        current = CURRENT_NUMBER.search(values)
        hint = ""
        if kind == "queue" and argument in OF_THE_TYPE:
            hint = 'set broker.queue_type to the type that it has ("classic" or "quorum"), '
        return Inequivalent(
            f"{kind} {name!r} exists in virtual host {place.vhost!r} with another {argument!r}: {values}. "
            f"Either {hint}choose another run name, or delete it if nothing in it is needed "
            f"(rabbitmqctl -p {place.vhost} delete_{kind} {name})",
            argument,
            int(current.group(1)) if current else None,
        )
    if match := TOO_LARGE.search(text):
        return MessageTooLarge(
            f"{place.address} takes messages of up to {match.group(1)} bytes: raise max_message_size in its "
            "rabbitmq.conf, or let fedmq send smaller ones (broker.max_message_bytes)"
        )
    return ConnectionLost(f"{place.address} closed the channel: {error.reply_code} {text}")


def _not_allowed(text: str, place: Place, operation: Operation) -> BrokerError:
    if place.has_expired:
        return ConnectionLost(f"{place.address}: the token has expired: {text}")
    named = NAMED_RIGHT.search(text)
    right = named.group(1) if named else operation.right
    return AccessRefused(
        f"user {place.user!r} lacks the {right} permission to {operation.name} in virtual host {place.vhost!r} "
        f"on {place.address} (rabbitmqctl set_permissions, or set_topic_permissions for a topic): {text}"
    )


def _absent(text: str, place: Place) -> BrokerError:
    if NOT_YET in text:
        return ConnectionLost(f"{place.address} is not ready yet: {text}")
    return Unroutable(f"{place.address}: {text}")


def verdict(reason: BrokerError, exchange: str, size: int) -> BrokerError:
    """What the end of a channel, for ``reason``, means for one message that was on its way over it."""
    if isinstance(reason, Unroutable):
        missing = NO_EXCHANGE.search(str(reason))
        if missing and missing.group(1) == exchange:
            return reason
    if isinstance(reason, MessageTooLarge) and size > limit_of(reason):
        return reason
    if isinstance(reason, FATAL):
        return reason
    return ConnectionLost(f"whether the message arrived is unknown: {reason}")


def limit_of(reason: MessageTooLarge) -> int:
    """The limit that the broker stated, in bytes; 0 if it stated none."""
    match = re.search(r"of up to (\d+) bytes", str(reason))
    return int(match.group(1)) if match else 0


def _text(error: BaseException) -> str:
    if isinstance(error, pika.exceptions.ConnectionClosed):
        return f"{error.reply_code} {error.reply_text}"
    if isinstance(error, pika.exceptions.AMQPConnectionError):
        return _plain(" ".join(str(part) for part in error.args)) or repr(error)
    return _plain(str(error)) or repr(error)


def _plain(text: str) -> str:
    """``text``, or what the operating system said if its error is quoted in it."""
    match = SYSTEM_ERROR.search(text)
    return match.group(1) if match else text


def _innermost(text: str) -> str:
    # pika wraps the operating system's error twice, each time with the whole text of the inner ones.
    match = re.search(r"last exception - (?:\w+: )?(.*?); first exception", text)
    return _plain(match.group(1) if match else text)
