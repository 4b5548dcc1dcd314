"""Work that is handed to a link's thread: all of it, in order, whatever else fails."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator

import pytest

from broker.amqp.connection import Link
from broker.amqp.session import Session
from broker.settings import BrokerConfig
from tests.support.waiting import wait_for

CONFIG = BrokerConfig.model_validate({"url": "amqp://u:p@somewhere/", "allow_plain": True})
THREADS, CALLS = 4, 500


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Iterator[Link]:
    async def never(_params: object) -> Session:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(Session, "connect", never)
    link = Link(CONFIG, "test", use=None, down=lambda _reason: None, failed=lambda _error: None)  # type: ignore[arg-type]
    link.start()
    yield link
    link.stop()


def test_calls_of_many_threads_are_all_done_and_those_of_each_in_order(link: Link) -> None:
    done: list[tuple[int, int]] = []

    def call(thread: int) -> None:
        for number in range(CALLS):
            assert link.call(done.append, (thread, number))

    threads = [threading.Thread(target=call, args=(index,)) for index in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    wait_for(lambda: len(done) == THREADS * CALLS, what="all calls")
    for index in range(THREADS):
        assert [number for thread, number in done if thread == index] == list(range(CALLS))


def test_a_call_that_fails_takes_no_other_with_it(link: Link, caplog: pytest.LogCaptureFixture) -> None:
    done: list[int] = []
    hold = threading.Event()

    def fail() -> None:
        raise ValueError("out of order")

    # So that the others wait together.
    link.call(hold.wait)
    with caplog.at_level(logging.ERROR):
        for function in (lambda: done.append(1), fail, lambda: done.append(2), fail, lambda: done.append(3)):
            link.call(function)
        hold.set()
        wait_for(lambda: len(done) == 3, what="the calls that do not fail")
    assert done == [1, 2, 3]
    wait_for(lambda: "out of order" in caplog.text, what="a line in the log")


def test_a_link_that_has_stopped_takes_nothing(link: Link) -> None:
    link.stop()
    assert not link.call(lambda: None)
    assert not link.call(lambda: None, after=1.0)
