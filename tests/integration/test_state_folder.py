"""What operators and disks do to a run's folder, with real processes: old copies, damage, a lost epoch."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from tests.support.commands import assert_one_message, fedmq
from tests.support.node import drain, ready
from tests.support.site import Site
from tests.support.waiting import wait_for

pytestmark = pytest.mark.broker


@pytest.fixture
def place(tmp_path: Path, node: PrivateNode) -> Iterator[Site]:
    with Site(tmp_path, node.url, workers=1, prefix="state") as place:
        place.initialise()
        yield place


class Crew:
    """An aggregator and a worker whose identity is not in the run's folder."""

    def __init__(self, place: Site, node: PrivateNode) -> None:
        self.place, self.node = place, node
        self.start_aggregator()
        self.start_worker()

    def start_aggregator(self, *more: str) -> None:
        self.aggregator = self.place.command("aggregator", *more)

    def start_worker(self) -> None:
        identity = str(self.place.folder / "identity")
        self.worker = self.place.command("worker", "--name", "w0", "--shard", "0/1", "--folder", identity)

    def wait_progress(self) -> None:
        goal = self.newest() + 2
        wait_for(lambda: self.newest() >= goal, 90, what=f"version {goal}; the log: {self.place.log()[-3000:]}")

    def newest(self) -> int:
        return max((line["version"] for line in self.place.history if line["kind"] == "version"), default=0)

    def stop_aggregator(self) -> None:
        self.aggregator.send_signal(signal.SIGTERM)
        assert self.aggregator.wait(60) == 0, self.place.log()[-3000:]

    def stop_worker(self) -> None:
        self.worker.send_signal(signal.SIGTERM)
        assert self.worker.wait(60) == 0, self.place.log()[-3000:]

    def finish(self) -> None:
        """Everything is taken in; the parameters, the ledger and the history agree."""
        self.stop_worker()
        wait_for(lambda: ready(self.node, self.place.topology.updates) == 0, 60, what="an empty queue")
        self.stop_aggregator()
        snapshot = self.place.store.load()
        partial = snapshot.accumulator.tensors.get("cells")
        total = snapshot.parameters["cells"] + (0 if partial is None else partial)
        done = fedmq(self.place.folder, "checkpoint", "verify")
        assert done.code == 0, done
        applied = sum(
            last - first + 1
            for by_incarnation in snapshot.ledger.values()
            for pairs in by_incarnation.values()
            for first, last in pairs
        )
        assert total[0] == applied


@pytest.fixture
def crew(place: Site, node: PrivateNode) -> Crew:
    return Crew(place, node)


@pytest.mark.parametrize("restored", ["the whole folder", "only the checkpoints"])
def test_last_weeks_copy_is_refused_and_goes_on_under_a_new_number_if_the_operator_insists(
    place: Site, node: PrivateNode, crew: Crew, restored: str
) -> None:
    """The broker's newest broadcast tells that the whole folder is old, and the history that the checkpoints are."""
    crew.wait_progress()
    crew.stop_aggregator()
    backup = place.folder / "backup"
    shutil.copytree(place.results, backup)
    crew.start_aggregator()
    crew.wait_progress()
    crew.stop_aggregator()
    # What the worker sends from the newest version waits in the queue.
    wait_for(lambda: ready(node, place.topology.updates) > 0, 60, what="updates that wait")
    crew.stop_worker()
    waiting, newest = ready(node, place.topology.updates), crew.newest()
    old = place.store.load().version
    if restored == "the whole folder":
        shutil.rmtree(place.results)
        shutil.copytree(backup, place.results)
    else:
        shutil.rmtree(place.results / "checkpoints")
        shutil.copytree(backup / "checkpoints", place.results / "checkpoints")
    assert place.store.load().version < old
    old = place.store.load().version
    before = {file: file.read_bytes() for file in sorted((place.results / "checkpoints").iterdir())}

    done = fedmq(place.folder, "aggregator", url=node.url)

    assert_one_message(done, 5, f"holds version {old}", f"version {newest}", "old copy restored", "--accept-older")
    after = {file: file.read_bytes() for file in sorted((place.results / "checkpoints").iterdir())}
    assert after == before
    assert ready(node, place.topology.updates) == waiting

    crew.start_aggregator("--accept-older")

    wait_for(lambda: ready(node, place.topology.dead) == waiting, 60, what="their rejection")
    crew.start_worker()
    crew.wait_progress()
    crew.finish()
    reasons = [(properties.headers or {})["reason"] for properties, _ in drain(node, place.topology.dead)]
    assert reasons == ["rolled-back"] * waiting
    versions = [line for line in place.history if line["kind"] == "version"]
    (taken_back,) = [line for line in versions if line.get("source") is not None]
    assert (taken_back["version"], taken_back["source"]) == (newest + 1, old)
    assert len({line["version"] for line in versions}) == len(versions)


def test_a_damaged_newest_checkpoint_is_set_aside_and_the_run_goes_on(
    place: Site, node: PrivateNode, crew: Crew
) -> None:
    crew.wait_progress()
    crew.aggregator.kill()
    crew.aggregator.wait()
    newest, version = place.store.files()[0], place.store.load().version
    content = bytearray(newest.read_bytes())
    content[-2] ^= 4
    newest.write_bytes(content)

    done = fedmq(place.folder, "checkpoint", "verify")
    assert_one_message(done, 5, "wrong with the state")
    assert f"{newest.name}: damaged" in done.out
    crew.start_aggregator()

    wait_for(lambda: place.epochs() == [1, 2], 60, what=f"the next start; the log: {place.log()[-3000:]}")
    assert "falling back to" in place.log()
    assert newest.with_name(f"{newest.name}.damaged").exists()
    crew.wait_progress()
    crew.finish()
    versions = [line["version"] for line in place.history if line["kind"] == "version"]
    assert versions == sorted(set(versions))
    assert place.store.load().version > version > 0


def test_a_folder_that_no_waiting_cures_is_one_clear_error(place: Site, node: PrivateNode, crew: Crew) -> None:
    crew.wait_progress()
    crew.stop_worker()
    crew.stop_aggregator()
    folder = place.results / "checkpoints"
    (folder / "epoch").write_bytes(b"\0\0\0")

    done = fedmq(place.folder, "aggregator", url=node.url)

    assert_one_message(done, 5, "epoch is damaged", "Stop all aggregators", "delete the file")
    for file in place.store.files():
        file.write_bytes(file.read_bytes()[:-7])
    for command in (("aggregator",), ("init",)):
        done = fedmq(place.folder, *command, url=node.url)
        assert_one_message(done, 5, "cannot be read", "restore one from a backup, or move the folder away")
    assert not list(folder.glob("*.damaged"))
