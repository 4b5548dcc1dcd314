"""An aggregator whose turn comes while its folder does not let it lead; and one that others supersede."""

from __future__ import annotations

import fcntl
import threading
from pathlib import Path
from typing import Any

import pytest

from aggregator import checkpoint, service
from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.machine import RoundMachine
from aggregator.service import AggregatorService
from broker.errors import CheckpointError, CheckpointOutdated
from broker.memory import MemoryBroker
from broker.transport import Outgoing
from broker.wire import encode
from tests.support.builders import RUN, spec_of, update_of, vector
from tests.support.waiting import wait_for

ZERO = {"w": vector(0)}


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", RUN)
    store.create(spec_of(ZERO), ZERO, now=0.0)
    return store


class Running:
    """A service on a thread, over the in-process broker, with one update in its queue."""

    def __init__(self, folder: Path, store: CheckpointStore, **settings: Any) -> None:
        self.broker = MemoryBroker()
        config = AggregatorConfig(buffer_size=1, linger=0.0, **settings)
        self.service = AggregatorService(folder=folder, run=RUN, config=config, store=store)
        self.errors: list[BaseException] = []
        self.broker.run(RUN).declared = True
        worker = self.broker.worker(RUN, "w0")
        worker.open(lambda _item: None)
        worker.publish(Outgoing(body=encode(update_of({"w": vector(1)}, base_epoch=0)))).result()
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        try:
            self.service.run(self.broker.aggregator(RUN))
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.errors.append(error)

    def stop(self) -> None:
        self.service.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()


@pytest.fixture
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service, "RETRY_SECONDS", 0.1)
    monkeypatch.setattr(checkpoint, "LOCK_SECONDS", 0.2)


@pytest.mark.usefixtures("patience")
def test_a_lock_whose_holder_hangs_is_waited_for_and_what_came_meanwhile_is_not_lost(
    tmp_path: Path, store: CheckpointStore, caplog: pytest.LogCaptureFixture
) -> None:
    with (store.folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = Running(tmp_path, store)
        wait_for(lambda: caplog.text.count("cannot lead run test yet") >= 2, what="two attempts")
        assert running.errors == []
        assert running.broker.depth(RUN) == 0, "the update is in its hands"

    wait_for(lambda: store.load().version == 1, what="the update in the model")
    running.stop()
    assert running.errors == []


@pytest.mark.usefixtures("patience")
def test_one_that_cannot_lead_yet_can_be_stopped(tmp_path: Path, store: CheckpointStore) -> None:
    with (store.folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        running = Running(tmp_path, store)
        wait_for(lambda: running.broker.depth(RUN) == 0, what="its turn")

        running.stop()

    assert running.errors == []
    assert running.broker.depth(RUN) == 1, "back in the queue"


def test_an_epoch_that_cannot_be_read_for_a_moment_ends_nobody(
    tmp_path: Path, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    running = Running(tmp_path, store)
    wait_for(lambda: store.load().version == 1, what="the update in the model")

    def unreadable(_store: CheckpointStore, _epoch: int) -> None:
        raise CheckpointError("Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "require_epoch", unreadable)
        wait_for(lambda: "does not answer as it should: Input/output error" in caplog.text, what="a warning")

    running.stop()
    assert running.errors == []


def test_a_fallback_that_was_interrupted_is_done_again(store: CheckpointStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The damaged file must explain why the state is old until the new number is durable."""
    snapshot = store.claim()
    newest = store.write(snapshot)
    newest.write_bytes(newest.read_bytes()[:-1] + b"?")

    def full(*_arguments: object, **_more: object) -> None:
        raise CheckpointError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointStore, "_put", full)
        with pytest.raises(CheckpointError, match="disk full"):
            store.claim(version=7)

    assert store.claim(version=7).version == 8
    assert newest.with_name(f"{newest.name}.damaged").exists()
    with pytest.raises(CheckpointOutdated):
        store.claim(version=20)


def test_a_run_whose_workers_are_all_gone_waits_without_spinning(
    tmp_path: Path, store: CheckpointStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING")
    seen: list[on.Happening] = []
    handle = RoundMachine.handle

    def noted(machine: RoundMachine, event: on.Happening, now: float) -> list[do.Effect]:
        seen.append(event)
        return handle(machine, event, now)

    monkeypatch.setattr(RoundMachine, "handle", noted)
    running = Running(tmp_path, store, worker_timeout=1.0)
    wait_for(lambda: "has been silent for too long" in caplog.text, what="the worker counts as gone")

    before = len(seen)
    wait_for(lambda: len(seen) >= before + 2, what="two turns of the loop")  # about a second each
    running.stop()

    assert len(seen) < before + 100
