"""A disk or a broker that takes long: the next update waits for it a while, lest it takes another model's memory."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import pytest

from aggregator import room
from aggregator.broadcasts import Announcer
from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core.machine import RoundMachine
from aggregator.core.snapshot import Snapshot
from aggregator.service import AggregatorService
from aggregator.strategies import Accumulator
from broker.memory import MemoryAggregatorTransport, MemoryBroker
from broker.transport import Outgoing
from broker.wire import encode
from tests.support.builders import RUN, spec_of, update_of, vector
from tests.support.waiting import wait_for


class Slow(CheckpointStore):
    """A disk that has taken the bytes and does not come to an end, or does not even take them."""

    def __init__(self, folder: Path, *, gives_back: bool) -> None:
        super().__init__(folder, RUN)
        self.gives_back = gives_back
        self.begun, self.goes_on = threading.Event(), threading.Event()

    def write(
        self, snapshot: Snapshot, copied: Callable[[], None] | None = None, first: Callable[[], None] | None = None
    ) -> Path:
        if copied is not None and self.gives_back:
            copied()
        self.begun.set()
        assert self.goes_on.wait(60)
        return super().write(snapshot, copied, first)


class Service:
    """A service on a thread, over the in-process broker, whose folder is a slow disk."""

    def __init__(self, folder: Path, *, gives_back: bool, size: int) -> None:
        self.store = Slow(folder / "checkpoints", gives_back=gives_back)
        self.store.create(spec_of({"w": vector(0)}), {"w": vector(0)}, now=0.0)
        broker = MemoryBroker()
        broker.run(RUN).declared = True
        config = AggregatorConfig(buffer_size=size, commit_count=1, linger=0.0)
        self.service = AggregatorService(folder=folder, run=RUN, config=config, store=self.store)
        self.transport = broker.aggregator(RUN)
        self.thread = threading.Thread(target=self.service.run, args=(self.transport,), daemon=True)
        self.thread.start()
        self._worker = broker.worker(RUN, "w0")
        self._worker.open(lambda _item: None)
        self._seq = 0

    def publish(self) -> None:
        update = update_of({"w": vector(1)}, seq=self._seq, base_epoch=0)
        self._seq += 1
        self._worker.publish(Outgoing(body=encode(update))).result()

    @property
    def machine(self) -> RoundMachine:
        assert self.service._led is not None
        return self.service._led.machine

    def stop(self) -> Snapshot:
        self.store.goes_on.set()
        self.service.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        return CheckpointStore(self.store.folder, RUN).load()


@pytest.mark.parametrize("gives_back", [True, False])
def test_an_update_waits_for_the_copy_and_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gives_back: bool
) -> None:
    """While one checkpoint hangs, the next update is folded: in place if it was given back, else into a copy."""
    monkeypatch.setattr(room, "LARGE", 0)
    monkeypatch.setattr(room, "WAIT_SECONDS", 60.0 if gives_back else 0.05)
    monkeypatch.setattr(room, "MAX_WAIT_SECONDS", 60.0)
    copies: list[int] = []
    copy = Accumulator.copy

    def counted(accumulator: Accumulator) -> Accumulator:
        copies.append(accumulator.count)
        return copy(accumulator)

    monkeypatch.setattr(Accumulator, "copy", counted)
    running = Service(tmp_path, gives_back=gives_back, size=9)

    running.publish()
    assert running.store.begun.wait(20)
    running.publish()
    wait_for(lambda: running.machine.fill == 2, what="both updates in the buffer")
    assert copies == ([] if gives_back else [1])

    loaded = running.stop()
    assert (len(loaded.entries), float(loaded.accumulator.tensors["w"][0])) == (2, 2.0)


def test_a_round_is_not_begun_beside_two_versions_if_the_disk_comes_to_an_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "LARGE", 0)
    monkeypatch.setattr(room, "MAX_WAIT_SECONDS", 60.0)
    monkeypatch.setattr(room, "WAIT_SECONDS", 60.0)
    running = Service(tmp_path, gives_back=True, size=2)
    waits: list[bool] = []

    def let_go(futures: Any, timeout: float) -> Any:
        waits.append(running.machine.trails)
        running.store.goes_on.set()
        return wait(futures, timeout)

    monkeypatch.setattr(room, "wait", let_go)
    for _ in range(3):
        running.publish()
        assert running.store.begun.wait(20)
    wait_for(lambda: (running.machine.version, running.machine.fill) == (1, 1), what="the third update in the buffer")

    assert waits[0]
    loaded = running.stop()
    assert (loaded.version, len(loaded.entries), float(loaded.parameters["w"][0])) == (1, 1, 1.0)


@pytest.mark.parametrize("is_sent", [True, False])
def test_a_round_is_not_begun_while_an_older_version_is_being_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_sent: bool
) -> None:
    """Until that is over, or somebody asks the aggregator to leave."""
    monkeypatch.setattr(room, "LARGE", 0)
    monkeypatch.setattr(room, "LOOK_SECONDS", 0.01)
    sent: list[Future[None]] = []
    looked: list[int | None] = []

    def held_back(_transport: MemoryAggregatorTransport, _message: Outgoing) -> Future[None]:
        sent.append(Future())
        return sent[-1]

    monkeypatch.setattr(MemoryAggregatorTransport, "broadcast", held_back)
    look = Announcer.wait

    def counted(announcer: Announcer, timeout: float, *, before: int | None = None) -> bool:
        looked.append(before)
        return look(announcer, min(timeout, 0.1), before=before)

    monkeypatch.setattr(Announcer, "wait", counted)
    running = Service(tmp_path, gives_back=True, size=1)
    running.store.goes_on.set()

    running.publish()
    wait_for(lambda: bool(looked), what="the first update")
    wait_for(lambda: running.machine.version == 1 and not running.machine.trails, what="the first version")
    running.publish()
    wait_for(lambda: looked.count(1) > 3, what="looking for the version before")
    assert (running.machine.version, running.machine.fill) == (1, 0)
    if is_sent:
        sent[0].set_result(None)
        wait_for(lambda: running.machine.version == 2, what="the second version")
    assert running.stop().version == 2  # if it was not sent, the memory is taken
