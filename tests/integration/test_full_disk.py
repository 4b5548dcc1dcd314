"""The aggregator's disk is full while a run goes on: nothing is acknowledged, nothing lost, room cures it."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from aggregator.core.ledger import Ledger
from broker.amqp.node import PrivateNode
from tests.support.commands import assert_one_message, fedmq
from tests.support.node import ready
from tests.support.site import Site
from tests.support.smalldisk import small_disk
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker

#: What the log says at each attempt.
SAID = "checkpoint not written"


@dataclass(frozen=True)
class Scene:
    """A site with an aggregator, and how its disk becomes full."""

    place: Site
    aggregator: subprocess.Popen[bytes]
    fill: Callable[[], None]
    make_room: Callable[[], None]

    def applied(self) -> int:
        """Updates that are durable."""
        return len(Ledger(self.place.store.load().ledger))

    def said(self) -> int:
        """How often the log has said that a checkpoint could not be written."""
        return self.place.log("copied").count(SAID)


@pytest.fixture(params=["a small disk", "a limit"])
def scene(request: pytest.FixtureRequest, tmp_path: Path, node: PrivateNode) -> Iterator[Scene]:
    """A real file system that is full; or, also for who is not root, files that may not grow."""
    with ExitStack() as stack:
        place = stack.enter_context(Site(tmp_path, node.url, workers=1, prefix="full"))
        place.results.parent.mkdir()
        disk = None
        if request.param == "a small disk":
            disk = stack.enter_context(small_disk(place.results, kilobytes=512))
        place.initialise()
        # A pipe is no file whose size could be limited.
        os.mkfifo(tmp_path / "pipe")
        threading.Thread(target=_copy, args=(tmp_path / "pipe", tmp_path / "copied"), daemon=True).start()
        aggregator = place.command("aggregator", log="pipe")
        if disk is not None:
            yield Scene(place, aggregator, disk.fill, disk.make_room)
        else:
            _, hard = resource.prlimit(aggregator.pid, resource.RLIMIT_FSIZE)
            yield Scene(
                place,
                aggregator,
                lambda: _limit(aggregator, 0, hard),
                lambda: _limit(aggregator, hard, hard),
            )


def _limit(process: subprocess.Popen[bytes], soft: int, hard: int) -> None:
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (soft, hard))


def _copy(pipe: Path, target: Path) -> None:
    with pipe.open("rb", buffering=0) as source, target.open("wb", buffering=0) as copied:
        while part := source.read(65536):
            copied.write(part)


def test_an_aggregator_whose_disk_is_full_waits_and_goes_on_when_there_is_room(
    scene: Scene, node: PrivateNode, tmp_path: Path
) -> None:
    place = scene.place
    # Its identity is not on the aggregator's disk, or it would not send anything.
    identity = tmp_path / "identity"
    worker = place.command("worker", "--name", "w0", "--shard", "0/1", "--folder", str(identity), log="worker")
    wait_for(lambda: place.version() >= 2, 90, what=f"versions; the log: {place.log('copied')}")

    def is_full() -> bool:
        # Again and again: an older generation that is deleted makes room, too.
        scene.fill()
        return scene.said() >= 1

    wait_for(is_full, 60, what="the first failure in the log")
    durable = scene.applied(), place.store.load().version, place.history
    # Once a retry, which is a few seconds; the history is on the same disk.
    wait_for(lambda: scene.said() >= 3, 60, what="two more attempts")

    assert scene.aggregator.poll() is None
    assert (scene.applied(), place.store.load().version, place.history) == durable
    scene.make_room()
    wait_for(lambda: place.version() >= durable[1] + 2, 90, what=f"versions; the log: {place.log('copied')[-2000:]}")
    worker.send_signal(signal.SIGTERM)
    assert worker.wait(60) == 0, place.log("worker")[-2000:]
    wait_for(lambda: ready(node, place.topology.updates) == 0, 60, what="an empty queue")
    scene.aggregator.send_signal(signal.SIGTERM)
    assert scene.aggregator.wait(60) == 0, place.log("copied")[-2000:]
    assert place.epochs() == [1]
    snapshot = place.store.load()
    partial = snapshot.accumulator.tensors.get("cells")
    total = snapshot.parameters["cells"] + (0 if partial is None else partial)
    confirmed = json.loads((identity / "outbox.json").read_text())["confirmed"]
    assert total[0] == scene.applied() == confirmed > 0
    done = fedmq(tmp_path, "checkpoint", "verify")
    assert done.code == 0, done


def test_a_disk_that_is_full_at_the_start_is_one_clear_error(tmp_path: Path, node: PrivateNode) -> None:
    with Site(tmp_path, node.url, workers=1, prefix="full") as place:
        place.results.parent.mkdir()
        with small_disk(place.results, kilobytes=128) as disk:
            place.initialise()
            disk.fill()
            before = sorted(file.name for file in place.results.rglob("*"))

            done = fedmq(tmp_path, "aggregator", url=node.url)

            assert_one_message(done, 5, "No space left on device; make room")
            assert sorted(file.name for file in place.results.rglob("*")) == before
            assert place.store.load().version == 0
