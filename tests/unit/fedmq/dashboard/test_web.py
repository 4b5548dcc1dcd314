"""The server of the page: who may ask, what every answer says to the browser, and how it ends."""

from __future__ import annotations

import http.client
import json
import socket
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager

import pytest

from broker.errors import ConfigError
from fedmq.dashboard.feed import Picture
from fedmq.dashboard.serving import PageServer, PortTaken, listen
from fedmq.dashboard.web import MOST_LISTENERS, STATIC
from tests.support.commands import ROOT


@pytest.fixture(scope="module")
def server() -> Iterator[PageServer]:
    look = Picture(view={"run": "digits", "version": 3}, series={"loss": [[1, 0.0, 2.5]]})
    with closing(listen("127.0.0.1", 0)) as taken, PageServer(lambda: look, taken, hosts=["page.example"]) as running:
        yield running


def port_of(server: PageServer) -> int:
    return int(server.url.rstrip("/").rpartition(":")[2])


@contextmanager
def asked(
    server: PageServer, path: str, *, host: str = "", method: str = "GET", **headers: str
) -> Iterator[http.client.HTTPResponse]:
    with closing(http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20)) as connection:
        connection.request(method, path, headers={"Host": host} | headers if host else headers)
        yield connection.getresponse()


def test_the_page_and_its_files_are_served_and_nothing_else(server: PageServer) -> None:
    for path in ("/", *(f"/static/{file.name}" for file in STATIC.iterdir())):
        with asked(server, path) as answer:
            assert answer.status == 200, path
    for path in ("/static/", "/static/../web.py", "/static/%2e%2e/web.py", "/static//etc/passwd", "/docs", "/static/x"):
        with asked(server, path) as answer:
            assert answer.status == 404, path


def test_nothing_can_be_changed_through_it(server: PageServer) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        for path in ("/", "/events", "/state.json", "/static/page.js"):
            with asked(server, path, method=method) as answer:
                assert answer.status == 405, (method, path)


@pytest.mark.parametrize("path", ["/", "/static/page.js", "/state.json", "/events", "/nowhere"])
def test_every_answer_keeps_the_browser_to_this_server(server: PageServer, path: str) -> None:
    with asked(server, path) as answer:
        policy = dict(part.strip().split(" ", 1) for part in str(answer.headers["content-security-policy"]).split(";"))
        assert policy["default-src"] == "'none'"
        assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
        assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cross-origin-resource-policy"] == "same-origin"
        # No other page may read it.
        assert "access-control-allow-origin" not in answer.headers
        assert "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:99", "127.0.0.1:7373", "[::1]", "[::1]:80", "192.168.0.7:80", "page.example:80"]
)
def test_addresses_and_names_of_ones_own_may_be_asked_for(server: PageServer, host: str) -> None:
    with asked(server, "/state.json", host=host) as answer:
        assert answer.status == 200


@pytest.mark.parametrize(
    "host",
    ["evil.example", "evil.example:7373", "127.0.0.1.evil.example", "localhost.evil.example", "x@127.0.0.1", ":"],
)
@pytest.mark.parametrize("path", ["/", "/state.json", "/events", "/static/page.js"])
def test_a_name_that_somebody_has_pointed_here_is_refused(server: PageServer, host: str, path: str) -> None:
    with asked(server, path, host=host) as answer:
        assert answer.status == 421
        assert b"digits" not in answer.read()


def test_the_page_has_no_script_or_style_of_its_own_and_names_no_other_server() -> None:
    page = (STATIC / "index.html").read_text()
    assert "style=" not in page
    assert "<style" not in page
    assert "onclick" not in page
    assert "<script type" in page
    for file in STATIC.iterdir():
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http:" not in text, file.name
        assert "https:" not in text, file.name
        # Text from outside is only ever put in as text.
        for word in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
            assert word not in text, file.name


def test_the_state_as_json(server: PageServer) -> None:
    with asked(server, "/state.json") as answer:
        assert json.loads(answer.read()) == {
            "view": {"run": "digits", "version": 3},
            "series": {"loss": [[1, 0.0, 2.5]]},
            "log": [],
        }


def test_too_many_browsers_are_told_so_and_the_page_still_comes(server: PageServer) -> None:
    streams = [http.client.HTTPConnection("127.0.0.1", port_of(server), timeout=20) for _ in range(MOST_LISTENERS)]
    try:
        for stream in streams:
            stream.request("GET", "/events")
            assert stream.getresponse().status == 200
        with asked(server, "/events") as answer:
            assert answer.status == 503
        with asked(server, "/") as answer:
            assert answer.status == 200
    finally:
        for stream in streams:
            stream.close()


def test_it_ends_promptly_with_streams_open_and_a_browser_that_reads_nothing() -> None:
    version = iter(range(10**9))

    def look() -> Picture:
        return Picture(view={"version": next(version), "text": "x" * 2_000_000})

    with closing(listen("127.0.0.1", 0)) as taken:
        server = PageServer(look, taken)
        with server, socket.create_connection(("127.0.0.1", port_of(server)), timeout=20) as deaf:
            deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            deaf.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
            with asked(server, "/events") as reading:
                assert reading.readline()
                server.stop()
                assert not server._thread.is_alive()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", port_of(server)), timeout=5)


def test_a_wheel_takes_along_all_files_of_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["fedmq"]
    for file in STATIC.iterdir():
        path = file.relative_to(ROOT / "fedmq")
        assert any(path.match(pattern) for pattern in patterns), path


def test_a_port_that_is_taken_and_an_address_of_nobody_are_said_with_what_to_do() -> None:
    with closing(listen("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(PortTaken, match=rf"port {port} of 127.0.0.1 is taken.*--port"):
            listen("127.0.0.1", port)
    with pytest.raises(ConfigError, match="no address of this machine: see --address"):
        listen("203.0.113.7", 0)
    with pytest.raises(ConfigError, match="no address of this machine"):
        listen("no such name", 0)
