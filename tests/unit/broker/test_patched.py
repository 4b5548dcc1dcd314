"""Where pika is mended."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque

import pika
import pika.data
import pika.exceptions
import pytest

from broker.amqp.patched import SMALL_BYTES, Connection
from broker.amqp.session import Session
from broker.errors import BrokerUnreachable
from tests.support.waiting import wait_for

PATIENCE = 60.0


class _GoneAtOnce(socket.socket):
    """A socket whose peer resets the connection before anybody can look at it."""

    def getsockopt(self, *arguments: int) -> int:  # type: ignore[override]
        """Asked how the attempt went: it went well, and then the peer was gone."""
        result = super().getsockopt(*arguments)
        wait_for(lambda: not _has_peer(self), PATIENCE, what="the reset")
        return result


def _has_peer(sock: socket.socket) -> bool:
    try:
        sock.getpeername()
    except OSError:
        return False
    return True


def test_a_connection_that_is_reset_as_soon_as_it_stands_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    # Given a server that resets whoever comes, before he looks
    with socket.create_server(("127.0.0.1", 0)) as server:
        params = pika.ConnectionParameters("127.0.0.1", server.getsockname()[1])
        params.connection_attempts = 1
        raised: list[dict[str, object]] = []

        async def attempt() -> None:
            loop = asyncio.get_running_loop()
            loop.set_exception_handler(lambda _loop, context: raised.append(context))
            reset = loop.run_in_executor(None, _reset_one, server)
            monkeypatch.setattr(socket, "socket", _GoneAtOnce)
            try:
                await Session.connect(params)
            finally:
                monkeypatch.undo()
                await reset

        # When someone connects
        with pytest.raises(BrokerUnreachable):
            asyncio.run(attempt())

    # Then he knows, and nothing was thrown into the loop instead, which would leave him waiting
    assert raised == []


def _reset_one(server: socket.socket) -> None:
    peer, _ = server.accept()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()


class _Socket:
    """What the connection sees of pika's transport: what was given to it, and has not been sent yet."""

    def __init__(self) -> None:
        self._tx_buffers: deque[bytes] = deque()
        self._tx_buffered_byte_count = 0

    def write(self, data: bytes) -> None:
        self._tx_buffers.append(data)
        self._tx_buffered_byte_count += len(data)


def test_small_frames_are_sent_together_and_in_order() -> None:
    connection = Connection.__new__(Connection)
    connection._transport = _Socket()
    frames = [bytes([number]) * 21 for number in range(200)] + [bytes(SMALL_BYTES), b"after"]

    for frame in frames:
        connection._adapter_emit_data(frame)

    waiting = connection._transport._tx_buffers
    assert b"".join(waiting) == b"".join(frames)
    # The first by itself, for a part of it may be on its way; and none is copied into a large one.
    assert waiting[0] == frames[0]
    assert [len(piece) for piece in waiting] == [21, 195 * 21, 4 * 21, SMALL_BYTES, 5]
    assert connection._transport._tx_buffered_byte_count == sum(map(len, frames))


def table(entries: bytes) -> bytes:
    return struct.pack(">I", len(entries)) + entries


def entry(kind: bytes, value: bytes = b"") -> bytes:
    return b"\x01h" + kind + value


def nested(levels: int) -> bytes:
    inner = table(b"")
    for _ in range(levels):
        inner = table(entry(b"F", inner))
    return inner


HOSTILE_TABLES = {
    "NaN": table(entry(b"d", struct.pack(">d", float("nan")))),
    "infinity": table(entry(b"f", struct.pack(">f", float("inf")))),
    "a kind that there is not": table(entry(b"?")),
    "a number that is cut off": table(entry(b"l", b"\0")),
    "nested 10,000 deep": nested(10_000),
}


@pytest.mark.parametrize("encoded", HOSTILE_TABLES.values(), ids=HOSTILE_TABLES.keys())
def test_headers_that_cannot_be_read_are_none_and_what_follows_them_is_found(encoded: bytes) -> None:
    headers, end = pika.data.decode_table(encoded + b"\x02id", 0)
    assert isinstance(headers, dict)
    assert pika.data.decode_short_string(encoded + b"\x02id", end) == ("id", end + 3)


def test_a_header_that_is_well_formed_is_read_as_ever() -> None:
    pieces: list[bytes] = []
    pika.data.encode_table(pieces, {"worker": "w1", "chunks": 4, "deep": {"a": [1, None]}})
    assert pika.data.decode_table(b"".join(pieces), 0)[0] == {"worker": "w1", "chunks": 4, "deep": {"a": [1, None]}}


def test_a_table_that_does_not_end_is_an_error() -> None:
    with pytest.raises((struct.error, pika.exceptions.AMQPError, ValueError)):
        pika.data.decode_table(struct.pack(">I", 100) + entry(b"?"), 0)


def test_a_short_string_that_is_no_utf8_is_text_with_escapes() -> None:
    assert pika.data.decode_short_string(b"\x03a\xffb", 0) == ("a\\xffb", 4)
