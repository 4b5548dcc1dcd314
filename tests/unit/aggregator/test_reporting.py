"""Events about updates that were folded: some together, none forgotten, none late."""

from __future__ import annotations

from pathlib import Path

from aggregator.core import effects as do
from aggregator.core.snapshot import Entry
from aggregator.history import History, read_history
from aggregator.reporting import FOLDED_SECONDS, MOST_NAMED, MOST_REJECTED, REJECTED_SECONDS, Reporter
from broker.memory import MemoryBroker
from broker.messages import Event, Reason, UpdateId
from broker.transport import Delivery, Incoming
from broker.wire import decode
from tests.support.builders import RUN


class Desk:
    """A reporter with a clock of its own, and what watchers see of it."""

    def __init__(self, folder: Path) -> None:
        self.now = 1000.0
        self.seen: list[Event] = []
        broker = MemoryBroker()
        broker.watch(RUN, self._see)
        transport = broker.aggregator(RUN)
        transport.open(lambda _item: None)
        self.reporter = Reporter(RUN, transport, History(folder / "history.jsonl"), lambda: self.now)

    def _see(self, item: Incoming) -> None:
        assert isinstance(item, Delivery)
        event = decode(item.body)
        assert isinstance(event, Event)
        self.seen.append(event)

    def fold(self, worker: str, staleness: int = 0, fill: int = 1) -> None:
        entry = Entry(UpdateId(worker, "i", 0), base_version=0, staleness=staleness, weight=1.0, examples=1, loss=None)
        self.reporter.record(do.Folded(entry, fill, 4, 0.0), 3)


def test_the_first_update_is_told_at_once(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    assert desk.reporter.due_in() is None

    desk.fold("w0", 2)

    assert desk.seen[0].data == {
        "what": "folded", "version": 3, "updates": 1, "staleness": "w0:2", "fill": 1, "goal": 4
    }  # fmt: skip
    assert desk.reporter.due_in() is None


def test_those_that_follow_soon_are_told_together(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.fold("w0")
    desk.now += FOLDED_SECONDS / 4
    for number, worker in enumerate(("w1", "w2", "w1"), 2):
        desk.fold(worker, number, fill=number)
    desk.reporter.tell_folded()
    assert len(desk.seen) == 1

    due = desk.reporter.due_in()
    assert due is not None
    desk.now += due + 1e-6
    desk.reporter.tell_folded()

    assert desk.seen[1].data["staleness"] == "w1:2 w2:3 w1:4"
    assert (desk.seen[1].data["updates"], desk.seen[1].data["fill"]) == (3, 4)
    assert desk.reporter.due_in() is None


def test_no_event_names_too_many(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for _ in range(1 + MOST_NAMED):
        desk.fold("w0")
    assert [event.data["updates"] for event in desk.seen] == [1, MOST_NAMED]


def test_at_the_end_nothing_is_kept_back(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    desk.fold("w0")
    desk.fold("w1")
    desk.reporter.tell_folded(at_once=True)
    assert [event.data["staleness"] for event in desk.seen] == ["w0:0", "w1:0"]


def test_the_history_tells_of_rejections_now_and_then(tmp_path: Path) -> None:
    desk = Desk(tmp_path)

    def told() -> list[dict[str, dict[str, int]]]:
        return [line["workers"] for line in read_history(tmp_path / "history.jsonl") if line["kind"] == "rejected"]

    def reject(worker: str, reason: Reason = Reason.NOT_FINITE) -> None:
        desk.reporter.record(do.Rejected(worker, reason, ""), 3)

    reject("w0")
    assert told() == [{"w0": {"not-finite": 1}}]
    for worker in ("w0", "w1", "w0"):
        reject(worker)
    assert len(told()) == 1
    desk.now += REJECTED_SECONDS
    reject("w1", Reason.TOO_STALE)
    assert told()[1:] == [{"w0": {"not-finite": 2}, "w1": {"not-finite": 1, "too-stale": 1}}]
    for number in range(MOST_REJECTED + 5):
        reject(f"n{number}")
    desk.reporter.tell_folded(at_once=True)
    assert len(told()) == 3
    assert len(told()[2]) == MOST_REJECTED + 1
    assert told()[2][""] == {"not-finite": 5}


def test_as_many_are_named_as_a_text_may_hold(tmp_path: Path) -> None:
    desk = Desk(tmp_path)
    for index in range(MOST_NAMED):
        desk.fold(f"{index:064}")
    desk.reporter.tell_folded(at_once=True)
    told = [str(event.data["staleness"]).split() for event in desk.seen]  # as a watcher decodes them
    assert sum(int(str(event.data["updates"])) for event in desk.seen) == MOST_NAMED
    assert [len(names) for names in told] == [1, 14]
    assert all(name.endswith(":0") for names in told for name in names)
