"""A line of the log: what it looks like, what it says of where it comes from, and what it never says."""

from __future__ import annotations

import io
import json
import logging
import threading
from typing import Any

import pytest
from rich.console import Console

from broker import logs
from broker.logs import describe, handler_for, is_json, member


@pytest.fixture(autouse=True)
def nothing_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "_process", {})


def formatted(message: str, *arguments: object, as_json: bool, terminal: bool = False, **more: Any) -> str:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    formatter = handler_for(console, as_json=as_json).formatter
    assert formatter is not None
    record = logging.LogRecord("fedmq.test", logging.WARNING, "f", 1, message, arguments, more.get("exc_info"))
    record.created = 1795832442.852
    for name, value in more.items():
        setattr(record, name, value)
    return formatter.format(record)


def test_a_line_of_json_says_where_it_comes_from() -> None:
    describe(role="worker", run="digits", worker="w1")
    describe(version=3, epoch=1)
    describe(version=4)

    line = json.loads(formatted('it is "%s" \n', "so", as_json=True))

    assert line == {
        "time": "2026-11-28T02:20:42.852Z",
        "level": "warning",
        "logger": "fedmq.test",
        "message": 'it is "so" \n',
        "role": "worker",
        "run": "digits",
        "worker": "w1",
        "epoch": 1,
        "version": 4,
    }


def test_it_is_one_line_whatever_it_holds() -> None:
    try:
        raise ValueError("two\nlines of amqp://u:hush@h/")
    except ValueError as error:
        text = formatted("no", as_json=True, exc_info=(type(error), error, error.__traceback__), exit_code=4)

    line = json.loads(text)
    assert "\n" not in text
    assert "two\nlines" in line["exception"]
    assert "hush" not in text
    assert line["exit_code"] == 4


def test_a_line_for_people_has_it_in_front() -> None:
    assert formatted("so", as_json=False).endswith("WARNING fedmq.test: so")
    describe(role="aggregator", run="digits", epoch=2, version=12)
    assert formatted("so", as_json=False).endswith("WARNING fedmq.test: [digits/aggregator e2 v12] so")
    assert formatted("so", as_json=False, terminal=True) == "[digits/aggregator e2 v12] so"
    describe(worker="w3")
    assert formatted("so", as_json=False, terminal=True) == "[digits/w3 e2 v12] so"


@pytest.mark.parametrize("as_json", [True, False])
def test_no_password_comes_out(as_json: bool) -> None:
    address = "amqp://someone:p4ss:@/w0rd@rabbit:5671/vhost"
    for text in (formatted("cannot reach %s", address, as_json=as_json), formatted(address, as_json=as_json)):
        assert "p4ss" not in text
        assert "w0rd" not in text
        assert "amqp://someone:***@rabbit:5671/vhost" in text


def test_members_of_one_process_are_told_apart() -> None:
    describe(run="r", version=1)
    seen: dict[str, str] = {}

    def live(name: str, version: int) -> None:
        with member(worker=name, role="worker"):
            describe(version=version)
            seen[name] = formatted("x", as_json=False, terminal=True)

    threads = [threading.Thread(target=live, args=(f"w{n}", n + 5)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert seen == {f"w{n}": f"[r/w{n} v{n + 5}] x" for n in range(3)}
    assert formatted("x", as_json=False, terminal=True) == "[r v1] x"


@pytest.mark.parametrize(
    ("form", "terminal", "service", "expected"),
    [
        ("auto", True, True, False),
        ("auto", False, True, True),
        ("auto", False, False, False),
        ("human", False, True, False),
        ("json", True, False, True),
    ],
)
def test_auto_is_json_where_no_person_looks(form: Any, terminal: bool, service: bool, expected: bool) -> None:
    console = Console(file=io.StringIO(), force_terminal=terminal)
    assert is_json(form, console, is_service=service) is expected
