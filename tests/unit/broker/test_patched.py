"""Where pika is mended."""

from __future__ import annotations

import asyncio
import socket
import struct

import pika
import pytest

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
