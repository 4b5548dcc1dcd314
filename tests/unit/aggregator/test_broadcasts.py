"""Versions on their way out: cut once, and those before waited for."""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

from aggregator.broadcasts import Announcer, Broadcasts
from aggregator.core import effects as do
from broker.errors import FedmqError
from broker.messages import ModelSpec, Parameters, Plan, TensorSpec
from broker.transport import AggregatorTransport, Outgoing
from broker.wire import Chunks, Sums, decode, join
from tests.support.builders import RUN

MODEL = ModelSpec((TensorSpec("w", (60_000,), "float32"),))
CHUNK = 65_536
TENSORS = {"w": np.ones(60_000, np.float32)}


def version_of(number: int) -> Parameters:
    return Parameters(
        run=RUN,
        epoch=1,
        version=number,
        plan=Plan(),
        digest="0" * 64,
        model=MODEL,
        tensors=TENSORS,
    )


def test_a_version_is_summed_once_however_often_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    summed = Chunks._made

    def counted(chunks: Chunks) -> Sums:
        made.append(1)
        return summed(chunks)

    monkeypatch.setattr(Chunks, "_made", counted)
    messages = Broadcasts(RUN, chunk_bytes=CHUNK)
    version = version_of(1)

    first = messages.message(version, 10 * CHUNK)
    again = messages.message(replace(version, plan=Plan(attempt=3)), 10 * CHUNK)
    assert len(made) == 1
    assert list(again.chunks) == list(first.chunks)
    manifest = cast("Any", decode(again.body))
    assert manifest.head.plan.attempt == 3
    join(manifest, again.message_id, again.chunks)

    # Another version, and the same in other pieces
    for number, largest in ((2, 10 * CHUNK), (2, CHUNK // 2)):
        message = messages.message(version_of(number), largest)
        join(cast("Any", decode(message.body)), message.message_id, message.chunks)
    assert len(made) == 3


class Slow:
    """A transport whose broadcasts are done when the test says so."""

    max_message_bytes = 10 * CHUNK

    def __init__(self) -> None:
        self.futures: list[Future[None]] = []

    def broadcast(self, _message: Outgoing) -> Future[None]:
        self.futures.append(Future())
        return self.futures[-1]


@pytest.fixture
def slow() -> tuple[Slow, Announcer]:
    transport = Slow()
    failed: list[FedmqError] = []
    messages = Broadcasts(RUN, chunk_bytes=CHUNK)
    announcer = Announcer(RUN, cast("AggregatorTransport", transport), messages, failed.append)
    for number in (1, 2):
        announcer.broadcast(do.Broadcast(1, number, Plan(), "0" * 64, MODEL, TENSORS))
    return transport, announcer


def test_only_versions_before_are_waited_for(slow: tuple[Slow, Announcer]) -> None:
    transport, announcer = slow
    announcer.wait(60.0, before=1)
    over = threading.Event()

    def wait() -> None:
        announcer.wait(60.0, before=2)
        over.set()

    thread = threading.Thread(target=wait)
    thread.start()
    assert not over.wait(0.05)
    transport.futures[0].set_result(None)
    assert over.wait(60.0)
    thread.join()


def test_no_longer_than_is_said(slow: tuple[Slow, Announcer]) -> None:
    _, announcer = slow
    began = time.monotonic()
    announcer.wait(0.05)
    assert time.monotonic() - began >= 0.05
