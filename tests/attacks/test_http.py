"""Requests that are none: the page and the metrics go on answering, and say nothing of it."""

from __future__ import annotations

import socket
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, closing

import pytest
from prometheus_client.registry import CollectorRegistry

from broker.metrics import serve
from broker.settings import MetricsConfig
from fedmq.dashboard.feed import Picture
from fedmq.dashboard.serving import PageServer, listen

GET = b"GET / HTTP/1.1\r\nHost: localhost\r\n"
REQUESTS = {
    "nothing": b"",
    "one byte": b"G",
    "bytes": bytes(range(256)) * 16,
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(64),
    "AMQP": b"AMQP\x00\x00\x09\x01",
    "a line without end": b"GET /" + b"a" * 200_000,
    "headers without end": GET + b"A: b\r\n" * 30_000,
    "a header without end": GET + b"A: " + b"a" * 200_000,
    "a negative length": GET + b"Content-Length: -1\r\n\r\n",
    "a length of 2^64": GET + b"Content-Length: 18446744073709551616\r\n\r\n",
    "two lengths": GET + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "length and chunks": GET + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "a chunk of 2^62": GET + b"Transfer-Encoding: chunked\r\n\r\n4000000000000000\r\na",
    "a line break in a header": GET + b"A: b\r\n c\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\nHost: localhost\r\n\r\n",
    "no version": b"GET /\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "a host that is none": b"GET / HTTP/1.1\r\nHost: [::1\r\n\r\n",
    "a host of bytes": b"GET / HTTP/1.1\r\nHost: \xff\xfe\x80\r\n\r\n",
    "a path that leads out": b"GET /static/../../../../etc/passwd HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path with a NUL": b"GET /static/%00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a path that is no UTF-8": b"GET /static/%ff%fe HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a whole address": b"GET http://example.com/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "a socket": GET + b"Upgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
    "a place in the stream that is none": b"GET /events HTTP/1.1\r\nHost: localhost\r\nLast-Event-ID: a-"
    + b"9" * 5000
    + b"\r\n\r\n",
    "a query of patterns": b"GET /metrics?name[]=%28a%2B%29%2B%24 HTTP/1.1\r\nHost: localhost\r\n\r\n",
    "many at once": (GET + b"\r\n") * 200,
}


@pytest.fixture(scope="module")
def ports() -> Iterator[dict[str, int]]:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with ExitStack() as stack:
        taken = stack.enter_context(closing(listen("127.0.0.1", 0)))
        stack.enter_context(PageServer(lambda: Picture(view={"version": 3}), taken))
        metrics = stack.enter_context(serve(MetricsConfig(port=port), CollectorRegistry()))
        assert metrics is not None
        yield {"/state.json": taken.getsockname()[1], "/metrics": metrics}


@pytest.mark.parametrize("path", ["/state.json", "/metrics"])
@pytest.mark.parametrize("request_bytes", REQUESTS.values(), ids=REQUESTS)
def test_whatever_is_asked_the_next_one_is_answered(
    ports: dict[str, int], path: str, request_bytes: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    with socket.create_connection(("127.0.0.1", ports[path]), timeout=20) as connection:
        try:
            connection.sendall(request_bytes)
            connection.shutdown(socket.SHUT_WR)
            answer = connection.recv(2**20)
        except OSError:
            answer = b""  # hung up on before all was said

    with urllib.request.urlopen(f"http://127.0.0.1:{ports[path]}{path}", timeout=20) as good:
        assert good.status == 200
    assert b"Traceback" not in answer
    assert b"root:" not in answer
    assert "Traceback" not in capfd.readouterr().err
