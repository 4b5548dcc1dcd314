"""The web application: one page, its files, and the stream of what changes. Nothing can be changed through it."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import AsyncIterator, Collection
from pathlib import Path

from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import FileResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fedmq.dashboard.feed import Feed

__all__ = ["STATIC", "application"]

STATIC = Path(__file__).parent / "static"

#: Open streams. A browser has at most six to one address, and nobody watches with hundreds.
MOST_LISTENERS = 50

#: Everything comes from here, no script or style stands in the page, and nobody may frame it.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": POLICY,
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}


def application(feed: Feed, *, hosts: Collection[str] = ()) -> Starlette:
    """The page of what ``feed`` tells. ``hosts``: names under which it may be asked for, besides this machine's."""

    async def page(_request: Request) -> Response:
        return FileResponse(STATIC / "index.html", headers={"cache-control": "no-cache"})

    async def events(request: Request) -> Response:
        if feed.listeners >= MOST_LISTENERS:
            return PlainTextResponse("too many browsers watch already\n", 503, {"retry-after": "10"})
        return StreamingResponse(
            feed.stream(request.headers.get("last-event-id", "")),
            media_type="text/event-stream",
            headers={"cache-control": "no-store"},
        )

    async def state(_request: Request) -> Response:
        return Response(await feed.whole(), media_type="application/json", headers={"cache-control": "no-store"})

    @contextlib.asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        looking = asyncio.create_task(feed.run())
        yield
        feed.close()
        await looking

    return Starlette(
        routes=[
            Route("/", page),
            Route("/events", events),
            Route("/state.json", state),
            Mount("/static", _Files(directory=STATIC)),
        ],
        middleware=[Middleware(_OnlyHosts, hosts=hosts), Middleware(_WithHeaders)],
        lifespan=lifespan,
    )


def is_known(host: str, hosts: Collection[str]) -> bool:
    """Whether a request that names ``host`` may be answered.

    A foreign page can make the browser ask for a name of its own that it has pointed at this machine (DNS rebinding),
    and would read the answer as its own. It cannot do so with an address, or with ``localhost``.
    """
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdecimal() and not host.endswith("]") else host
    name = name.rstrip(".").lower()
    if name == "localhost" or name in {known.lower() for known in hosts}:
        return True
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


class _OnlyHosts:
    """Refuses requests for names that are not ours."""

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app = app
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_known(Headers(scope=scope).get("host", ""), self._hosts):
            text = "this name is not known here: ask by address, or name it in dashboard.host_names\n"
            await PlainTextResponse(text, 421)(scope, receive, send)
            return
        await self._app(scope, receive, send)


class _WithHeaders:
    """Adds to every answer what browsers should keep to."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_with(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        await self._app(scope, receive, send_with if scope["type"] == "http" else send)


class _Files(StaticFiles):
    """The browser asks each time whether its copy is the newest: another release may be running now."""

    def file_response(self, *args: object, **kwargs: object) -> Response:
        response = super().file_response(*args, **kwargs)  # type: ignore[arg-type]
        response.headers["cache-control"] = "no-cache"
        return response
