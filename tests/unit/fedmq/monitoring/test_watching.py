"""The management API may be away, slow, refuse, be something else: the watch goes on and says what is missing."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from pydantic import SecretStr

from broker.errors import BrokerUnreachable
from broker.settings import BrokerConfig
from broker.topology import Topology
from fedmq.monitoring import watching
from fedmq.monitoring.watching import Watching
from tests.support.commands import ABSENT
from tests.support.waiting import wait_for

RUN = Topology("r")
QUEUES = [{"name": RUN.updates, "messages_ready": 3, "messages_unacknowledged": 2, "message_bytes": 7, "consumers": 1}]
CONSUMERS = [{"queue": {"name": RUN.turn}, "consumer_tag": "aggregator/host/1-turn", "active": True}]
NODES = [{"name": "rabbit@a", "running": True, "mem_alarm": True}]

Answer = tuple[int, Any]


def in_order(path: str) -> Answer:
    return 200, {"queues": QUEUES, "consumers": CONSUMERS, "nodes": NODES}[path]


@contextmanager
def api(answer: Callable[[str], Answer]) -> Iterator[str]:
    """A server that gives for the first word of a path a status and a body, as JSON unless it is bytes."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, body = answer(self.path.split("?")[0].split("/")[2])
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_arguments: object) -> None:
            """Not in the tests' output."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def config(url: str) -> BrokerConfig:
    """Nothing answers AMQP."""
    return BrokerConfig.model_validate({"url": SecretStr(ABSENT), "management_url": url})


def seen(url: str) -> dict[str, Any]:
    """What is seen once the API was asked."""
    with Watching(config(url), "r") as watch:
        assert watch.asked.wait(30)
        return watch.monitor.snapshot()


def test_all_that_the_api_tells_is_shown_even_without_amqp() -> None:
    with api(in_order) as url:
        snapshot = seen(url)
    (queue,) = snapshot["queues"]
    assert (queue["ready"], queue["unacked"], queue["bytes"]) == (3, 2, 7)
    assert snapshot["aggregators"] == [{"name": "host/1", "active": True, "epoch": None, "seen_seconds": None}]
    assert snapshot["alarms"] == ["rabbit@a: memory alarm: it takes no messages until some is free"]


def test_a_user_without_the_tag_for_alarms_sees_the_rest() -> None:
    with api(lambda path: (403, b"no") if path == "nodes" else in_order(path)) as url:
        snapshot = seen(url)
    assert snapshot["queues"][0]["ready"] == 3
    assert snapshot["alarms"] is None
    assert [text for text in snapshot["missing"] if text.startswith("the broker's alarms: user 'someone' may not")]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((401, b"who?"), "may not use the admin UI"),
        ((401, {"error": "not_authorised", "reason": "Login failed"}), "check user and password"),
        ((401, {"error": "not_authorised", "reason": "Not management user"}), "give it the tag 'monitoring'"),
        ((404, b"\x00\xff"), "404"),
        ((200, b"<html>"), "does not answer"),
        ((200, {"items": QUEUES}), "something else than a list"),
        ((500, b""), "500"),
        ((200, b"[" * 100_000), "does not answer"),
    ],
)
def test_an_api_that_is_none_is_told_and_nothing_breaks(answer: Answer, words: str) -> None:
    with api(lambda _path: answer) as url:
        snapshot = seen(url)
    assert (snapshot["queues"], snapshot["alarms"]) == ([], None)
    (text,) = [text for text in snapshot["missing"] if text.startswith("bytes and unacked messages in queues")]
    assert words in text


def test_an_api_that_does_not_answer_keeps_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "ANSWER_SECONDS", 0.2)
    end = threading.Event()

    def slow(_path: str) -> Answer:
        end.wait(60)
        return 200, []

    with api(slow) as url:
        try:
            with Watching(config(url), "r") as watch:
                assert watch.monitor.snapshot()["queues"] == []
                assert watch.asked.wait(30)
                (text,) = [text for text in watch.monitor.snapshot()["missing"] if text.startswith("bytes")]
                assert "timed out" in text
        finally:
            end.set()


def test_answers_that_are_old_are_not_shown_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "OLD_SECONDS", 0.2)
    monkeypatch.setattr(watching, "ASK_SECONDS", 0.05)
    monkeypatch.setattr(watching, "LOOK_SECONDS", 0.1)
    is_gone = threading.Event()
    with (
        api(lambda path: (503, b"busy") if is_gone.is_set() else in_order(path)) as url,
        Watching(config(url), "r") as watch,
    ):
        wait_for(lambda: watch.monitor.snapshot()["queues"], 30, what="queues")
        is_gone.set()
        wait_for(lambda: not watch.monitor.snapshot()["queues"], 30, what="the end of what was known")
        assert watch.monitor.snapshot()["alarms"] is None


def test_a_broker_that_is_away_is_told_in_time() -> None:
    with Watching(config("http://127.0.0.1:1"), "r") as watch:
        begun = time.monotonic()
        with pytest.raises(BrokerUnreachable, match=r"no connection to RabbitMQ within \d+ s: .*127\.0\.0\.1"):
            watch.await_connection(1.0)
        assert time.monotonic() - begun < 20
