"""The server of the page, on a thread of its own: whoever starts it goes on with their work."""

from __future__ import annotations

import errno
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection
from types import TracebackType
from typing import Self

import uvicorn

from broker.errors import ConfigError, FedmqError
from fedmq.dashboard.feed import Feed, Picture
from fedmq.dashboard.web import application

__all__ = ["PageServer", "PortTaken", "listen"]

#: Seconds that requests in hand may take at the end. Streams end by themselves.
GRACE_SECONDS = 2
START_SECONDS = 60.0
STOP_SECONDS = 10.0


class PortTaken(ConfigError):
    """Somebody else listens there."""


class PageServer:
    """Serves the page of what ``look`` sees, within a ``with`` block."""

    def __init__(
        self,
        look: Callable[[], Picture],
        listening: socket.socket,
        *,
        hosts: Collection[str] = (),
        context: ssl.SSLContext | None = None,
    ) -> None:
        """``listening`` is from :func:`listen`; ``hosts`` are names that may be asked for; ``context`` makes it TLS."""
        self._socket = listening
        self.url = _url(*listening.getsockname()[:2], scheme="http" if context is None else "https")
        """Where a browser on this machine finds the page."""
        self._feed = Feed(look)
        config = uvicorn.Config(
            application(self._feed, hosts=hosts),
            log_config=None,
            # Whoever sends nonsense to the port is told so, and nobody else.
            log_level="error",
            access_log=False,
            server_header=False,
            lifespan="on",
            loop="asyncio",
            http="h11",
            ws="none",
            timeout_graceful_shutdown=GRACE_SECONDS,
        )
        config.load()
        config.ssl = context
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="dashboard", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        deadline = time.monotonic() + START_SECONDS
        while not self._server.started:
            if not self._thread.is_alive() or time.monotonic() > deadline:
                raise FedmqError("the dashboard's server did not start")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Tell the browsers how it stands, and end."""
        self._feed.close()
        self._server.should_exit = True
        self._thread.join(STOP_SECONDS)

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


def _url(host: str, port: int, *, scheme: str) -> str:
    if ipaddress.ip_address(host).is_unspecified:
        host = "::1" if ":" in host else "127.0.0.1"
    return f"{scheme}://[{host}]:{port}/" if ":" in host else f"{scheme}://{host}:{port}/"


def listen(address: str, port: int) -> socket.socket:
    """A socket at ``address``; ``port`` 0 is any that is free.

    Raises:
        PortTaken: somebody else has it.
        ConfigError: there is no such address on this machine, or the user may not.
    """
    try:
        family, *_, where = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server((str(where[0]), int(where[1])), family=family)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            text = f"port {port} of {address} is taken, maybe by another dashboard: choose another --port, or 0 for any"
            raise PortTaken(text) from None
        if error.errno == errno.EACCES:
            text = f"port {port} needs rights that this user does not have: choose a --port above 1023"
        elif error.errno == errno.EADDRNOTAVAIL or isinstance(error, socket.gaierror):
            text = f"{address!r} is no address of this machine: see --address"
        else:
            text = f"cannot listen at {address}, port {port}: {error.strerror or error}"
        raise ConfigError(text) from None
