"""From the round machine through the aggregator's status to the view: what an operator is told is what is so."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator import status
from aggregator.core import events as on
from aggregator.core.rounds import Buffered
from aggregator.core.rules import Rules
from aggregator.core.standing import QuarantinePolicy
from aggregator.status import PAGE, PAGES_AT_ONCE, Figures, StatusTeller
from broker.memory import MemoryBroker
from broker.messages import Array, Event, EventKind, Goodbye, Hello, Reason, Role, Scalar, Update
from fedmq.monitoring.monitor import Monitor
from tests.support.builders import RUN, rules_of, snapshot_of, update_of, vector
from tests.unit.aggregator.driver import Driver

NOW = 1_800_000_000.0


def sent(
    worker: str, seq: int, tensors: dict[str, Array], *, seconds: float = 0.0, steps: int = 0, **more: Any
) -> Update:
    """An update of ``worker``, which took so long."""
    return replace(update_of(tensors, worker=worker, seq=seq, **more), seconds=seconds, steps=steps)


class Desk:
    """A machine, its teller, and a monitor that hears it; one clock for all."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, rules: Rules | None = None) -> None:
        self.driver = Driver(
            rules or rules_of(rounds=Buffered(size=2, max_staleness=100)), snapshot_of({"w": vector(0, 0)}), NOW
        )
        self.broker = MemoryBroker()
        self.monitor = Monitor(RUN)
        monkeypatch.setattr(self.monitor, "now", lambda: self.driver.now)
        self.broker.watch(RUN, self.monitor.take)
        transport = self.broker.aggregator(RUN)
        transport.open(lambda _item: None)
        self.teller = StatusTeller(RUN, transport, folder, lambda: self.driver.now)
        self._noted = 0

    def tell(self, *, leaves: bool = False) -> dict[str, Any]:
        """A status, and what is seen after it."""
        for fact in self.driver.facts[self._noted :]:
            self.teller.figures.note(fact)
        self._noted = len(self.driver.facts)
        self.teller.tell(self.driver.machine, 1, (-1, {}), leaves=leaves)
        return self.monitor.snapshot()

    def workers(self) -> dict[str, dict[str, Any]]:
        """The rows of the last snapshot, by name."""
        return {row["name"]: row for row in self.tell()["workers"]}


def test_what_the_machine_knows_is_seen_after_one_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "00000001.safetensors").write_bytes(b"x" * 100)
    desk = Desk(tmp_path, monkeypatch)
    desk.driver.hello("a", "b")
    desk.driver.hello("e", role=Role.EVALUATOR)
    for seq, worker in enumerate("abb"):
        desk.driver.update(sent(worker, seq, {"w": vector(1, 0)}, seconds=2.0, steps=4, metrics={"loss": 0.5}))

    seen = desk.tell()

    assert (seen["run"], seen["version"], seen["epoch"], seen["state"]) == (RUN, 1, 1, "running")
    assert seen["buffer"] == {"fill": 1, "goal": 2}
    assert seen["aggregators"] == [{"name": status.own_name(), "active": True, "epoch": 1, "seen_seconds": 0.0}]
    assert (seen["staleness"], seen["updates"], seen["loss"]) == ({"median": 0.0, "p95": 1.0, "max": 1.0}, 3, 0.5)
    assert seen["disk"]["checkpoints"] == 1
    assert seen["disk"]["bytes"] == 100
    assert 0 < seen["disk"]["free"] <= seen["disk"]["total"]
    rows = {row["name"]: row for row in seen["workers"]}
    assert {name: (row["role"], row["updates"]) for name, row in rows.items()} == {
        "a": ("trainer", 1), "b": ("trainer", 2), "e": ("evaluator", 0)
    }  # fmt: skip
    assert (rows["b"]["seconds"], rows["b"]["pace"], rows["b"]["staleness"]) == (2.0, 0.5, 0.1)
    assert rows["a"]["cosine"] == pytest.approx(1.0)
    assert desk.monitor.wait_complete(0)


def test_a_poisoned_worker_stands_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(
        tmp_path,
        monkeypatch,
        rules_of(rounds=Buffered(size=2, max_staleness=100), quarantine=QuarantinePolicy(2.0, 600.0)),
    )
    desk.driver.hello("good", "bad")
    for seq in range(4):
        desk.driver.update(sent("bad", seq, {"w": vector(np.nan, 0)}))
    desk.driver.update(sent("good", 0, {"w": vector(1, 0)}))

    rows = desk.workers()

    assert rows["good"]["remarks"] == []
    assert rows["bad"]["state"] == "quarantine"
    assert rows["bad"]["rejected"] == {"not-finite": 3, "quarantined": 1}
    assert rows["bad"]["quarantined_until"] == NOW + 600
    assert rows["bad"]["remarks"] == [
        "in quarantine until 2027-01-15 08:10:00 UTC",
        "4 rejected: 3 not-finite, 1 quarantined",
        "score 3.0",
    ]
    assert desk.tell()["rejected"] == {"not-finite": 3, "quarantined": 1}


def test_a_worker_whose_updates_point_against_the_others_stands_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    desk = Desk(tmp_path, monkeypatch, rules_of(rounds=Buffered(size=3, max_staleness=100)))
    for worker, value in (("a", 1.0), ("b", 1.0), ("liar", -1.0)):
        desk.driver.update(sent(worker, 0, {"w": vector(value, 0)}))
    rows = desk.workers()
    assert rows["a"]["remarks"] == []
    assert rows["liar"]["remarks"] == ["against the others: cosine -1.00"]


def test_what_a_worker_said_last_is_seen_by_who_comes_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    for name, seconds in (("a", 0.2), ("b", 0.2), ("lame", 4.0)):
        desk.driver.hello(name)
        said: dict[str, Scalar] = {"state": "training", "version": 7, "loss": 0.5, "seconds": seconds, "x": "y" * 1000}
        desk.teller.hear(Event(run=RUN, kind=EventKind.HEARTBEAT, source=name, time=NOW, data=said))
    row = desk.workers()["lame"]
    assert (row["state"], row["version"], row["loss"], row["seconds"]) == ("training", 7, 0.5, 4.0)
    assert row["remarks"] == ["slow: 20.0 times the median's seconds an update"]


def test_silence_is_seen_at_once_by_whoever_begins_to_watch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    desk.driver.hello("gone", "here")
    desk.driver.tick(40)
    desk.driver.hello("here")
    rows = desk.workers()
    assert (rows["gone"]["state"], rows["gone"]["seen_seconds"]) == ("silent", 40.0)
    assert rows["gone"]["remarks"] == ["silent for 40 s"]
    assert (rows["here"]["state"], rows["here"]["remarks"]) == ("here", [])


def test_a_worker_that_has_left_is_not_silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    desk.driver.hello("a")
    desk.driver.goodbye("a")
    desk.driver.tick(100)
    row = desk.workers()["a"]
    assert (row["state"], row["remarks"]) == ("left", ["left"])


def test_hundreds_of_workers_come_in_pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch, rules_of(rounds=Buffered(size=10_000, max_staleness=100)))
    number = PAGE * PAGES_AT_ONCE + 1
    desk.driver.hello(*(f"w{i:03}" for i in range(number)))

    first = desk.tell()
    assert len(first["workers"]) == PAGE * PAGES_AT_ONCE
    assert not desk.monitor.wait_complete(0)

    assert len(desk.tell()["workers"]) == number
    assert desk.monitor.wait_complete(0)


def test_the_longest_page_is_a_message(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text may have 1024 bytes on the wire, and an event's data 64 keys: nobody could read one with more."""
    desk = Desk(
        tmp_path,
        monkeypatch,
        rules_of(rounds=Buffered(size=10_000, max_staleness=100), quarantine=QuarantinePolicy(1.0, 600.0)),
    )
    machine = desk.driver.machine
    for index in range(PAGE):
        name = f"{index:064}"
        desk.driver.send(on.Joined(Hello(run=RUN, worker=name, incarnation="i")))
        desk.driver.update(
            sent(name, 0, {"w": vector(1, 0)}, seconds=123456.7891, steps=7, metrics={"loss": -1.23456e-200})
        )
        said: dict[str, Scalar] = {"state": "ä" * 99, "version": 2**53, "loss": -1.23456e-200, "seconds": 1.23456e-200}
        desk.teller.hear(Event(run=RUN, kind=EventKind.HEARTBEAT, source=name, time=NOW, data=said))
        desk.driver.send(on.Left(Goodbye(run=RUN, worker=name, incarnation="i", reason="ä" * 999)))
        for reason in Reason:
            for _ in range(3):
                machine.screening.reject(name, reason, 0, NOW)
    machine.rejected.update({reason.value: 2**50 for reason in Reason})
    for fact in desk.driver.facts:
        desk.teller.figures.note(fact)
    metrics = {f"{i:064}": 1.2345678e-200 for i in range(64)}
    desk.teller.tell(machine, 2**40, (2**40, metrics))
    assert len(desk.monitor.snapshot()["workers"]) == PAGE


def test_a_standby_is_seen_beside_the_active_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    desk.tell()
    monkeypatch.setattr(desk.teller, "_name", "other/7")
    desk.teller.tell_standby()
    shown = desk.monitor.snapshot()["aggregators"]
    assert [(one["name"], one["active"]) for one in shown] == [(status.own_name(), True), ("other/7", False)]

    desk.teller.tell_standby(leaves=True)
    assert [one["name"] for one in desk.monitor.snapshot()["aggregators"]] == [status.own_name()]


def test_an_aggregator_that_leaves_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    assert desk.tell()["state"] == "running"
    seen = desk.tell(leaves=True)
    assert (seen["state"], seen["aggregators"]) == ("silent", [])
    assert seen["missing"] == ["the aggregator has left, and no other leads: its figures are the last ones"]
    assert desk.tell()["state"] == "running"


def test_the_last_status_of_a_run_says_that_it_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch, rules_of(rounds=Buffered(size=1, max_staleness=100), stop_after_rounds=1))
    desk.driver.update(sent("a", 0, {"w": vector(1, 0)}))
    desk.tell(leaves=True)
    desk.driver.now += 1000
    seen = desk.monitor.snapshot()
    assert (seen["state"], seen["rounds"], seen["version"]) == ("done", 1, 1)


def test_rates_are_those_of_the_last_minute_or_of_two_rounds() -> None:
    figures = Figures()
    assert figures.sample(0.0) == (None, None)
    desk = Driver(rules_of(rounds=Buffered(size=1, max_staleness=100)), snapshot_of({"w": vector(0)}))

    def rounds(number: int, first: int) -> None:
        for seq in range(first, first + number):
            desk.update(sent("a", seq, {"w": vector(1)}, base_version=seq))
        for fact in desk.facts:
            figures.note(fact)
        desk.facts.clear()

    rounds(30, 0)
    assert figures.sample(30.0) == (1.0, 60.0)
    for second in range(31, 91):
        assert figures.sample(float(second)) is not None
    assert figures.sample(91.0) == pytest.approx((30 / 91, 60 * 30 / 91))
    rounds(2, 30)
    assert figures.sample(152.0) == pytest.approx((2 / 61, 120 / 61))


def test_a_folder_that_is_away_is_no_reason_to_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path / "away", monkeypatch)
    assert set(desk.tell()["disk"].values()) == {None}


def test_updates_of_before_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    desk.teller.figures.begin({"a": 5, "old": 3})
    desk.driver.update(sent("a", 9, {"w": vector(1, 0)}))
    rows = desk.workers()
    assert (rows["a"]["updates"], rows["old"]["updates"]) == (6, 3)
    assert (rows["old"]["state"], rows["old"]["seen_seconds"]) == ("away", None)


def test_one_that_was_replaced_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    desk = Desk(tmp_path, monkeypatch)
    desk.teller.tell(desk.driver.machine, 5, (-1, {}))
    desk.driver.update(sent("a", 0, {"w": vector(1, 0)}))
    desk.teller.tell(desk.driver.machine, 4, (-1, {}))
    seen = desk.monitor.snapshot()
    assert (seen["epoch"], seen["buffer"]["fill"]) == (5, 0)
