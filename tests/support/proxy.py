"""A TCP proxy that misbehaves on demand: cuts, delays, black-holes and slices connections, also inside a frame.

It runs on a thread of its own. A black hole keeps what it swallows, as a partitioned network does (TCP sends it
again when the way is free), so that healing never corrupts a stream. Sizes of slices follow from the seed and the
connection's number alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import urlsplit

from tests.support.frames import Cut, Frames

__all__ = ["BOTH", "Direction", "Proxy"]

T = TypeVar("T")

PIECE = 64 * 1024
#: How long a caller waits for the proxy's thread.
PATIENCE = 30.0


class Direction(StrEnum):
    """Which way bytes go."""

    UP = "up"
    """From the client to the server."""
    DOWN = "down"
    """From the server to the client."""


BOTH = frozenset(Direction)


@dataclass
class _Way:
    """One direction of one connection."""

    direction: Direction
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    frames: Frames
    random: random.Random


class _Connection:
    """One client and the server that it thinks it speaks to."""

    def __init__(self, up: _Way, down: _Way) -> None:
        self.ways = (up, down)

    def cut(self, *, reset: bool) -> None:
        """End both sides: with a RST, or with a FIN as if the peer had closed."""
        for way in self.ways:
            if reset:
                _reset(way.writer)
            else:
                way.writer.close()


class Proxy:
    """Forwards from a port of its own to ``host:port``. A context manager; every method may be called by any thread.

    Args:
        host: the server's host.
        port: the server's port.
        seed: what slices and jitter are drawn from.
    """

    def __init__(self, host: str, port: int, *, seed: int = 0) -> None:
        self._target = host, port
        self._seed = seed
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._server: asyncio.Server | None = None
        self._connections: set[_Connection] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._count = 0
        self._delay = 0.0
        self._slice = 0
        self._refusing = False
        self._cuts: list[Cut] = []
        self._open = {direction: asyncio.Event() for direction in Direction}
        self.carried = dict.fromkeys(Direction, 0)
        """Bytes that were passed on so far, by direction."""
        self.port = 0

    @classmethod
    def to(cls, url: str, *, seed: int = 0) -> Proxy:
        """A proxy before the server of ``url``."""
        parts = urlsplit(url)
        return cls(parts.hostname or "127.0.0.1", parts.port or 5672, seed=seed)

    def url(self, url: str) -> str:
        """``url`` as it leads through this proxy."""
        parts = urlsplit(url)
        user, at, _ = parts.netloc.rpartition("@")
        return parts._replace(netloc=f"{user}{at}127.0.0.1:{self.port}").geturl()

    # ----------------------------------------------------------------------------------------- life cycle

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Listen."""
        self._thread.start()
        for gate in self._open.values():
            self._call(gate.set)
        self.port = asyncio.run_coroutine_threadsafe(self._listen(), self._loop).result(PATIENCE)

    def stop(self) -> None:
        """Cut everything and end the thread."""
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(PATIENCE)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._loop.close()

    # -------------------------------------------------------------------------------------- misbehaviour

    @property
    def connections(self) -> int:
        """Connections that go through it now."""
        return self._call(lambda: len(self._connections))

    def cut(self, *, reset: bool = True) -> int:
        """Cut all connections, with a RST or a FIN; how many there were."""
        return self._call(lambda: self._cut_all(reset=reset))

    def cut_in_frame(
        self, offset: int, *, kind: int | None = None, direction: Direction = Direction.UP, least: int = 0
    ) -> Cut:
        """Cut the connection whose next fitting AMQP frame comes first, ``offset`` bytes into that frame.

        Args:
            offset: bytes of the frame that still get through; its head of 7 always does.
            kind: 1 method, 2 header, 3 body; None for any.
            direction: which way the frame goes.
            least: the frame's payload has this many bytes at least.

        Returns what says whether it has happened.
        """
        cut = Cut(offset=offset, kind=kind, direction=direction, least=least)
        self._call(lambda: self._cuts.append(cut))
        return cut

    def cut_after(self, count: int, *, direction: Direction = Direction.UP) -> Cut:
        """Cut the first connection on which ``count`` further bytes went in ``direction``, wherever that is."""
        cut = Cut(offset=count, kind=None, direction=direction, least=0, framed=False)
        self._call(lambda: self._cuts.append(cut))
        return cut

    def hole(self, *directions: Direction) -> None:
        """Let nothing through in these directions (none given: in both), not even the end of a connection."""
        for direction in directions or BOTH:
            self._call(self._open[direction].clear)

    def delay(self, seconds: float) -> None:
        """Keep each piece that comes for half to one and a half times ``seconds``."""
        self._delay = seconds

    def slices(self, largest: int) -> None:
        """Pass on pieces of 1 to ``largest`` bytes, each as a packet of its own; 0 for what comes."""
        self._slice = largest

    def refuse(self) -> None:
        """Close every new connection at once, as a port does behind which nobody listens any more."""
        self._refusing = True

    def heal(self) -> None:
        """Forward as a wire does. Cuts that did not come about are called off."""
        self._delay, self._slice, self._refusing = 0.0, 0, False
        self._call(self._cuts.clear)
        for gate in self._open.values():
            self._call(gate.set)

    # ------------------------------------------------------------------------------------- on the thread

    def _call(self, function: Callable[[], T]) -> T:
        async def run() -> T:
            return function()

        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE)

    async def _listen(self) -> int:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def _close(self) -> None:
        if self._server is not None:
            self._server.close()
        self._cut_all(reset=True)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # sockets are closed a turn of the loop after they were given up

    def _cut_all(self, *, reset: bool) -> int:
        for connection in self._connections:
            connection.cut(reset=reset)
        return len(self._connections)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._serve(reader, writer)
        except asyncio.CancelledError:
            # Only the end of the proxy cancels, and asyncio's server complains of a task that says so.
            return
        finally:
            self._tasks.discard(task)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._refusing:
            _reset(writer)
            return
        try:
            far_reader, far_writer = await asyncio.open_connection(*self._target)
        except OSError:
            # As the client would see it without a proxy: nobody there.
            _reset(writer)
            return
        self._count += 1
        connection = _Connection(
            self._way(Direction.UP, reader, far_writer), self._way(Direction.DOWN, far_reader, writer)
        )
        for end in (writer, far_writer):
            end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connections.add(connection)
        try:
            await asyncio.gather(*(self._forward(way, connection) for way in connection.ways))
        finally:
            self._connections.discard(connection)
            for way in connection.ways:
                way.writer.close()

    def _way(self, direction: Direction, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> _Way:
        draw = random.Random(f"{self._seed}:{self._count}:{direction}")
        return _Way(direction, reader, writer, Frames(direction is Direction.UP), draw)

    async def _forward(self, way: _Way, connection: _Connection) -> None:
        gate = self._open[way.direction]
        try:
            while True:
                await gate.wait()
                data = await way.reader.read(PIECE)
                await gate.wait()
                if not data:
                    if way.writer.can_write_eof() and not way.writer.is_closing():
                        way.writer.write_eof()
                    return
                if not await self._pass_on(data, way):
                    connection.cut(reset=True)
                    return
        except OSError:
            await gate.wait()
            connection.cut(reset=True)

    async def _pass_on(self, data: bytes, way: _Way) -> bool:
        """Send ``data`` on its way, in pieces; False if the connection is to be cut after them."""
        if self._delay:
            await asyncio.sleep(self._delay * way.random.uniform(0.5, 1.5))
        last = way.frames.feed(data, [cut for cut in self._cuts if cut.direction is way.direction])
        end = len(data) if last is None else last[0]
        position = 0
        while position < end:
            size = way.random.randint(1, self._slice) if self._slice else end - position
            way.writer.write(data[position : min(position + size, end)])
            self.carried[way.direction] += min(position + size, end) - position
            position = min(position + size, end)
            await way.writer.drain()
            if self._slice:
                await asyncio.sleep(0)
        if last is None:
            return True
        with contextlib.suppress(ValueError):
            self._cuts.remove(last[1])
        last[1].happened.set()
        # What was written has to be gone before the reset, which throws away what still waits.
        await asyncio.sleep(0.01)
        return False


def _reset(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()
