"""The table from pika's exceptions to ours, and the other rules about RabbitMQ that need no broker."""

from __future__ import annotations

import logging
import socket

import pika
import pytest
from pika import exceptions
from pika.adapters.utils.io_services_utils import _AsyncTransportBase

from broker.amqp.credentials import parameters
from broker.amqp.publisher import plain
from broker.amqp.refusals import Operation, Place, channel_error, connection_error, verdict
from broker.amqp.session import version_of
from broker.errors import (
    AccessRefused,
    BrokerError,
    BrokerUnreachable,
    ConnectionLost,
    MessageTooLarge,
    TopologyMismatch,
    Unroutable,
    UnsupportedBroker,
)
from broker.settings import BrokerConfig

PLACE = Place("host:5672", "/", "bob")
LOGIN = "ConnectionClosedByBroker: (403) 'ACCESS_REFUSED - Login was refused using authentication mechanism PLAIN.'"
NO_VHOST = "ConnectionClosedByBroker: (530) 'NOT_ALLOWED - vhost x not found'"
NO_ACCESS = "ConnectionClosedByBroker: (530) \"NOT_ALLOWED - access to vhost '/' refused for user 'bob'\""
FULL = NO_ACCESS[:-1] + ': connection limit (3) is reached"'


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (exceptions.ProbableAuthenticationError(LOGIN), AccessRefused),
        (exceptions.ProbableAuthenticationError("StreamLostError: ('Transport indicated EOF',)"), BrokerUnreachable),
        (exceptions.ProbableAccessDeniedError(NO_VHOST), AccessRefused),
        (exceptions.ProbableAccessDeniedError(NO_ACCESS), AccessRefused),
        (exceptions.ProbableAccessDeniedError(FULL), BrokerUnreachable),
        (exceptions.ProbableAccessDeniedError("StreamLostError: ('Transport indicated EOF',)"), BrokerUnreachable),
        (exceptions.AuthenticationError("PLAIN"), UnsupportedBroker),
        (exceptions.IncompatibleProtocolError("HTTP"), BrokerUnreachable),
        (exceptions.AMQPConnectionError(ConnectionRefusedError(111, "Connection refused")), BrokerUnreachable),
        (OSError("no route"), BrokerUnreachable),
    ],
)
def test_why_a_connection_was_not_made(error: Exception, expected: type[BrokerError]) -> None:
    assert type(connection_error(error, PLACE, opened=False)) is expected


@pytest.mark.parametrize(
    "error",
    [
        exceptions.ConnectionClosedByBroker(320, "CONNECTION_FORCED - broker forced connection closure"),
        exceptions.StreamLostError("reset"),
        exceptions.AMQPHeartbeatTimeout("no activity"),
        exceptions.ConnectionBlockedTimeout("blocked"),
    ],
)
def test_whatever_ends_an_open_connection_is_worth_retrying(error: Exception) -> None:
    translated = connection_error(error, PLACE, opened=True)
    assert type(translated) is ConnectionLost
    assert translated.retryable


@pytest.mark.parametrize("opened", [True, False])
@pytest.mark.parametrize(
    "inner", [ConnectionResetError(104, "Connection reset by peer"), socket.gaierror(-2, "Name or service not known")]
)
def test_an_error_of_the_operating_system_is_told_in_its_words(inner: OSError, opened: bool) -> None:
    lost, other = (
        exceptions.StreamLostError(f"Stream connection lost: {inner!r}"),
        exceptions.AMQPConnectionError(inner),
    )
    for error in (lost, other):
        text = str(connection_error(error, PLACE, opened=opened))
        assert text.endswith(str(inner.strerror))
        assert "rror" not in text


def closed(code: int, text: str) -> exceptions.ChannelClosedByBroker:
    return exceptions.ChannelClosedByBroker(code, text)


@pytest.mark.parametrize(
    ("error", "expected", "words"),
    [
        (
            closed(403, "ACCESS_REFUSED - access to queue 'q' refused for user 'bob'"),
            AccessRefused,
            "configure permission",
        ),
        (
            closed(403, "ACCESS_REFUSED - write access to topic 'r.w' in exchange 'x' refused for user 'bob'"),
            AccessRefused,
            "lacks the write permission",
        ),
        (closed(404, "NOT_FOUND - no queue 'q' in vhost '/'"), Unroutable, "no queue 'q'"),
        (
            closed(404, "NOT_FOUND - home node 'a@b' of durable queue 'q' in vhost '/' is down or inaccessible"),
            ConnectionLost,
            "not ready yet",
        ),
        (closed(405, "RESOURCE_LOCKED - cannot obtain exclusive access"), ConnectionLost, "RESOURCE_LOCKED"),
        (
            closed(
                406,
                "PRECONDITION_FAILED - inequivalent arg 'x-overflow' for queue 'q' in vhost '/': "
                "received none but current is the value 'reject-publish'",
            ),
            TopologyMismatch,
            "queue 'q' exists",
        ),
        (
            closed(406, "PRECONDITION_FAILED - message size 9 is larger than configured max size 8"),
            MessageTooLarge,
            "up to 8 bytes",
        ),
        (
            closed(406, "PRECONDITION_FAILED - message size 9 is larger than max size 8"),
            MessageTooLarge,
            "up to 8 bytes",
        ),
        (closed(406, "PRECONDITION_FAILED - unknown delivery tag 5"), ConnectionLost, "unknown delivery tag"),
        (exceptions.StreamLostError("reset"), ConnectionLost, "reset"),
    ],
)
def test_why_a_channel_ended(error: Exception, expected: type[BrokerError], words: str) -> None:
    translated = channel_error(error, PLACE, Operation("declare queue 'q'", "configure"))
    assert isinstance(translated, expected)
    assert words in str(translated)


def test_what_the_end_of_a_channel_means_for_each_message_on_its_way() -> None:
    missing = Unroutable("host: NOT_FOUND - no exchange 'fedmq.updates' in vhost '/'")
    assert verdict(missing, "fedmq.updates", 1) is missing
    assert isinstance(verdict(missing, "fedmq.events", 1), ConnectionLost)
    limit = channel_error(closed(406, "message size 9 is larger than max size 8"), PLACE, Operation("publish"))
    assert isinstance(verdict(limit, "x", 9), MessageTooLarge)
    assert isinstance(verdict(limit, "x", 8), ConnectionLost)
    refused = AccessRefused("no")
    assert verdict(refused, "x", 1) is refused


@pytest.mark.parametrize(
    ("text", "expected"),
    [("3.10.8", (3, 10, 8)), ("4.0.0-rc.1", (4, 0, 0)), ("3.13.7+2", (3, 13, 7)), ("4.1", (4, 1, 0)), ("?", (0, 0, 0))],
)
def test_versions(text: str, expected: tuple[int, int, int]) -> None:
    assert version_of(text) == expected


def test_headers_are_reduced_to_what_every_queue_carries() -> None:
    headers = {"run": "r", "round": 3, "flag": True, "ratio": 0.5, "x-death": [], "x-stream-offset": 4, "none": None}
    assert plain(headers) == {"run": "r", "round": 3}
    assert plain(None) == {}


def test_parameters_follow_the_settings() -> None:
    url = "amqp://u:p@a/,amqps://u:p@b:1234/v"
    timeouts = {"heartbeat": 17, "blocked_timeout": 9, "connect_timeout": 3}
    config = BrokerConfig.model_validate({"url": url, "allow_plain": True, **timeouts})
    first, second = parameters(config, "name")
    assert (first.host, first.port, first.virtual_host, first.ssl_options) == ("a", 5672, "/", None)
    assert (second.host, second.port, second.virtual_host) == ("b", 1234, "v")
    assert second.ssl_options is not None
    assert (first.heartbeat, first.blocked_connection_timeout, first.socket_timeout) == (17, 9, 3)
    assert first.connection_attempts == 1


def test_pika_still_has_the_receive_size_that_we_raise() -> None:
    assert _AsyncTransportBase._MAX_RECV_BYTES == 4096
    assert _AsyncTransportBase._MAX_CONSUME_BYTES == 102400


def test_pikas_loggers_are_quiet_unless_somebody_wants_them(caplog: pytest.LogCaptureFixture) -> None:
    from broker.amqp.session import quiet_pika  # noqa: PLC0415

    logger = logging.getLogger("pika")
    before = logger.level
    try:
        logger.setLevel(logging.NOTSET)
        quiet_pika()
        logging.getLogger("pika.channel").critical("hidden")
        logger.setLevel(logging.INFO)
        quiet_pika()
        logging.getLogger("pika.channel").info("shown")
    finally:
        logger.setLevel(before)
    assert [record.message for record in caplog.records] == ["shown"]
    assert pika.__version__.startswith("1.")
