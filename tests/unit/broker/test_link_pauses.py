"""How long links wait, and what they say meanwhile; the broker is a function of the test's."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from broker.amqp.connection import LONGEST_PAUSE, Link, pause
from broker.amqp.names import Lookups
from broker.amqp.session import Channel, Session
from broker.errors import AccessRefused, BrokerError, BrokerUnreachable, ConnectionLost
from broker.settings import BrokerConfig
from tests.support.waiting import wait_for

CONFIG = BrokerConfig.model_validate({"url": "amqp://u:p@somewhere/", "allow_plain": True})


class FakeSession:
    """A connection that ends as soon as it is used."""

    traffic = (0, 0)

    def __init__(self) -> None:
        self.closed: asyncio.Future[BrokerError] = asyncio.get_running_loop().create_future()
        self.closed.set_result(ConnectionLost("cut"))
        self.place = type("Place", (), {"address": "somewhere:5672", "user": "u"})

    async def close(self) -> None: ...


class Rig:
    """A link whose attempts and pauses are noted; pauses take no time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.attempts = 0
        self.pauses: list[float] = []
        self.outcome: BrokerError | None = None
        self.failures: list[BrokerError] = []
        self.enough = threading.Event()

        async def wait(_link: Link, seconds: float) -> None:
            self.pauses.append(seconds)
            if len(self.pauses) >= 60:
                self.enough.set()
                await asyncio.sleep(3600)
            await asyncio.sleep(0)

        async def connect(_parameters: Any) -> FakeSession:
            self.attempts += 1
            if self.outcome is not None:
                raise self.outcome
            return FakeSession()

        async def use(_channel: Channel) -> None: ...

        monkeypatch.setattr(Session, "connect", connect)
        monkeypatch.setattr(Link, "_wait", wait)
        self.link = Link(CONFIG, "a link", use=use, down=lambda _: None, failed=self.failures.append)


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(monkeypatch)
    yield made
    made.link.stop()


def test_a_broker_that_is_away_is_asked_more_and_more_seldom_and_talked_of_once(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    rig.outcome = BrokerUnreachable("somewhere:5672: refused")
    with caplog.at_level(logging.INFO, logger="fedmq"):
        rig.link.start()
        assert rig.enough.wait(30)

    assert rig.attempts == len(rig.pauses) == 60
    assert max(rig.pauses[:3]) <= 0.8
    assert 2.0 < max(rig.pauses[10:]) <= LONGEST_PAUSE
    assert len(set(rig.pauses[10:])) > 10  # jitter over all of it, not the same for everybody
    assert min(rig.pauses[10:]) < 4.0
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "no connection (somewhere:5672: refused)" in caplog.text


def test_connections_that_break_at_once_are_made_more_and_more_seldom_too(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="fedmq"):
        rig.link.start()
        assert rig.enough.wait(30)

    assert rig.attempts == 60
    assert 2.0 < max(rig.pauses[10:]) <= LONGEST_PAUSE
    assert len(caplog.records) <= 3  # connected, broke, connected; and then the same again


def test_a_refusal_is_handed_over_and_not_logged(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    """Whoever is told of it says it; two links of one transport would say it twice."""
    rig.outcome = AccessRefused("wrong password")
    with caplog.at_level(logging.INFO, logger="fedmq"):
        rig.link.start()
        wait_for(lambda: rig.failures, what="the refusal")

    assert rig.failures == [rig.outcome]
    assert (rig.attempts, caplog.records) == (1, [])


def test_a_link_that_waits_for_a_broker_tries_at_once_when_another_has_found_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("broker.amqp.connection.BACKOFF", lambda _state: 3600.0)
    attempts: list[float] = []

    async def connect(_parameters: Any) -> FakeSession:
        attempts.append(0)
        raise BrokerUnreachable("away")

    async def use(_channel: Channel) -> None: ...

    monkeypatch.setattr(Session, "connect", connect)
    link = Link(CONFIG, "a link", use=use, down=lambda _: None, failed=lambda _: None)
    link.start()
    try:
        for number in (1, 2, 3):
            wait_for(lambda n=number: len(attempts) >= n, what="an attempt")  # type: ignore[misc]
            # Again and again: nobody knows when the link has begun to wait.
            wait_for(lambda n=number: [link.hurry()] and len(attempts) > n, what="the next attempt")  # type: ignore[misc, func-returns-value]
    finally:
        link.stop()


def test_connections_that_break_at_once_are_not_hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleeping = threading.Event()

    async def sleep(seconds: float) -> None:
        waits.append(seconds)
        sleeping.set()
        await asyncio.Event().wait()

    async def connect(_parameters: Any) -> FakeSession:
        return FakeSession()

    async def use(_channel: Channel) -> None: ...

    monkeypatch.setattr(Session, "connect", connect)
    monkeypatch.setattr("asyncio.sleep", sleep)
    link = Link(CONFIG, "a link", use=use, down=lambda _: None, failed=lambda _: None)
    link.start()
    assert sleeping.wait(30)
    through = threading.Event()
    link.hurry()
    link.call(link.call, through.set)  # two turns of its loop later
    assert through.wait(30)
    link.stop()
    assert len(waits) == 1


def test_pauses_are_bounded() -> None:
    assert all(0 <= pause(attempt) <= LONGEST_PAUSE for attempt in (1, 2, 5, 50, 10_000) for _ in range(50))


def test_a_lookup_hands_over_result_or_error_and_its_end_waits_for_none() -> None:
    lookups, blocked = Lookups(), threading.Event()

    assert lookups.submit(lambda n: n + 1, 1).result(30) == 2
    assert isinstance(lookups.submit(int, "none").exception(30), ValueError)
    waiting = lookups.submit(blocked.wait, 60)
    lookups.shutdown(wait=True)
    assert not waiting.done()

    blocked.set()
    assert waiting.result(30)
