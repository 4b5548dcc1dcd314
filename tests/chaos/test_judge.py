"""The judge sees what is wrong: a verdict that is always good would be worth nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.checkpoint import CheckpointStore
from aggregator.core.rounds import Buffered
from aggregator.core.snapshot import Snapshot
from aggregator.history import History
from aggregator.optimizers import Sgd
from aggregator.staleness import constant
from aggregator.strategies import Mean
from broker.messages import UpdateId
from tests.chaos.federation import Tail
from tests.chaos.judge import Knowledge, Verdict, judge
from tests.chaos.nemesis import KINDS, Done, Fault, schedule
from tests.chaos.report import Report
from tests.support.builders import RUN, rules_of, snapshot_of, update_of
from tests.support.tasks import CELLS
from tests.unit.aggregator.driver import Driver

WORKERS = 2
UPDATES = 5
BUFFER = 4


class Case:
    """A run of ten updates: two versions, and two updates in the round that is open."""

    def __init__(self, folder: Path, width: int = 0) -> None:
        self.folder = folder
        shape = (CELLS, width) if width else (CELLS,)
        self.store = CheckpointStore(folder / "checkpoints", RUN)
        self.history = folder / "history.jsonl"
        rules = rules_of(
            rounds=Buffered(size=BUFFER, max_staleness=100),
            strategy=Mean("uniform", constant()),
            optimizer=Sgd(float(BUFFER)),
            settings={"learning_rate": float(BUFFER)},
        )
        driver = Driver(rules, snapshot_of({"cells": np.zeros(shape)}))
        for seq in range(UPDATES):
            for index in range(WORKERS):
                delta = np.zeros(shape)
                delta[index] = 1.0
                version = driver.machine.version
                driver.update(update_of({"cells": delta}, worker=f"w{index}", seq=seq, base_version=version))
        self.store.write(driver.machine.snapshot(0.0))
        history = History(self.history)
        for record in driver.records:
            history.version(record)
        self.knowledge = Knowledge()
        for index in range(WORKERS):
            self.knowledge.collect(self.outbox(f"w{index}", UPDATES, UPDATES))

    def outbox(self, worker: str, next_seq: int, confirmed: int, incarnation: str = "i") -> Path:
        file = self.folder / f"{worker}.json"
        content = {"worker": worker, "incarnation": incarnation, "next_seq": next_seq, "confirmed": confirmed}
        file.write_text(json.dumps(content))
        return file

    def judge(self) -> Verdict:
        return judge(self.store, self.history, self.knowledge)

    def rewrite(self, **facts: Any) -> None:
        """Put other facts into the checkpoint."""
        self.store.write(replace(self.store.load(), **facts))

    def retell(self, change: Callable[[list[dict[str, Any]]], object]) -> None:
        """Change the lines of the history."""
        lines = [json.loads(line) for line in self.history.read_text().splitlines()]
        change(lines)
        self.history.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.fixture
def case(tmp_path: Path) -> Case:
    return Case(tmp_path)


def test_a_run_in_which_everything_counts_once_is_good(case: Case) -> None:
    verdict = case.judge()

    verdict.require_good()
    assert (verdict.issued, verdict.confirmed, verdict.applied, verdict.versions) == (10, 10, 10, 2)


def test_a_confirmed_update_that_is_not_applied_is_lost(case: Case) -> None:
    case.knowledge.collect(case.outbox("w0", UPDATES + 1, UPDATES + 1))

    verdict = case.judge()

    assert verdict.lost == [UpdateId("w0", "i", UPDATES)]
    assert not verdict.is_good


@pytest.mark.parametrize("is_applied", [True, False])
def test_an_update_that_nobody_knows_about_may_be_applied_or_not(tmp_path: Path, is_applied: bool) -> None:
    case = Case(tmp_path)
    case.knowledge = Knowledge()
    case.knowledge.collect(case.outbox("w0", UPDATES if is_applied else UPDATES + 1, UPDATES - is_applied))
    case.knowledge.collect(case.outbox("w1", UPDATES, UPDATES))

    verdict = case.judge()

    verdict.require_good()
    assert (verdict.indeterminate, verdict.settled) == (1, int(is_applied))


def test_an_update_that_the_history_names_twice_is_doubled(case: Case) -> None:
    case.retell(lambda lines: lines[1]["updates"].append(lines[0]["updates"][0]))

    assert case.judge().doubled == [UpdateId("w0", "i", 0)]


def _cells(snapshot: Snapshot, index: int) -> dict[str, Any]:
    cells = np.array(snapshot.parameters["cells"])
    cells[index] += 1.0
    return {"cells": cells}


@pytest.mark.parametrize(
    ("wrong", "what"),
    [
        (lambda case: case.rewrite(parameters=_cells(case.store.load(), 1)), "cell 1 holds 6.0, and 5 updates"),
        (lambda case: case.rewrite(parameters=_cells(case.store.load(), 7)), "cell 7 holds 1.0, and 0 updates"),
        (lambda case: case.rewrite(ledger={"w0": {"i": [[0, 4]]}, "w1": {"i": [[0, 3]]}}), "not in the ledger"),
        (lambda case: case.rewrite(ledger={"w0": {"i": [[0, 5]]}, "w1": {"i": [[0, 4]]}}), "having been given out"),
        (lambda case: case.rewrite(entries=()), "not in the history"),
        (lambda case: case.rewrite(digest="0" * 64), "not those of the history's last version"),
        (lambda case: case.retell(lambda lines: lines.pop()), "are not 1 to 2"),
        (lambda case: case.retell(lambda lines: lines[1].update(before="0" * 64)), "version 2 does not start from"),
        (lambda case: case.retell(lambda lines: lines[0].update(after="0" * 64)), "version 1 is not what its updates"),
        (lambda case: case.retell(lambda lines: lines[0]["updates"][0].update(weight=0.5)), "version 1 is not what"),
        (lambda case: case.knowledge.collect(case.outbox("w0", 2, 2)), "went back from 5 ids to 2"),
    ],
)
def test_whatever_does_not_agree_is_a_problem(case: Case, wrong: Callable[[Case], object], what: str) -> None:
    wrong(case)

    verdict = case.judge()

    assert any(what in problem for problem in verdict.problems), verdict
    with pytest.raises(AssertionError, match="problems"):
        verdict.require_good()


def test_a_row_of_the_sheet_must_be_the_count_everywhere(tmp_path: Path) -> None:
    """As after a chunk of another update."""
    case = Case(tmp_path, width=6)
    case.judge().require_good()

    cells = np.array(case.store.load().parameters["cells"])
    cells[1, 2:4] += 1
    case.rewrite(parameters={"cells": cells})

    assert any("cell 1 holds 5.0 to 6.0, and 5 updates" in problem for problem in case.judge().problems)


def test_of_each_life_only_the_last_update_is_uncertain(case: Case) -> None:
    known = Knowledge()
    known.collect(case.folder / "missing.json")
    known.collect(case.outbox("w0", 3, 2, "a"))
    assert known.indeterminate == {UpdateId("w0", "a", 2)}

    # Nothing happened in the next life, and in the one after it two were confirmed
    known.collect(case.outbox("w0", 3, 2, "a"))
    known.collect(case.outbox("w0", 5, 4, "a"))
    assert known.indeterminate == {UpdateId("w0", "a", 2)}

    # A life under another name
    known.collect(case.outbox("w0", 1, 0, "b"))
    assert known.indeterminate == {UpdateId("w0", "a", 2), UpdateId("w0", "b", 0)}
    assert len(known.issued) == 6


def test_faults_follow_from_the_seed() -> None:
    first, again, other = (list(islice(schedule(seed, 2.0), 400)) for seed in (7, 7, 8))

    assert first == again != other
    assert {fault.kind for fault in first} == set(KINDS)


def test_the_tail_of_a_history_is_read_once_and_by_whole_lines(case: Case) -> None:
    tail = Tail(case.history)
    lines = case.history.read_bytes()
    case.history.write_bytes(lines[:-10])
    tail.look()
    assert len(tail.versions) == 1

    case.history.write_bytes(lines)
    tail.look()
    tail.look()
    assert [updates for _, _, updates in tail.versions] == [BUFFER, BUFFER]
    assert tail.heard.keys() == {"w0", "w1"}


def test_recovery_is_the_time_until_the_next_version(case: Case) -> None:
    fault = Fault(1, 0.0, "kill worker", 0.0, 0.0, 0.0, 0.0)
    done = [Done(fault, "worker-0", at=10.0, healed=12.0), Done(fault, "worker-0", at=30.0)]
    report = Report(
        seed=1, seconds=40.0, done=done, missed={}, made=[9.0, 11.0, 15.0, 31.0], verdict=case.judge(), problems=[]
    )

    assert report.recovery(from_healing=False) == {"kill worker": [1.0, 1.0]}
    assert report.recovery(from_healing=True) == {"kill worker": [3.0]}
    # The second fault met a run that had made nothing for a while.
    assert report.undisturbed() == {"kill worker": [1.0]}
    assert not replace(report, done=[*done, replace(done[0], at=10.5)]).undisturbed()
    assert report.longest_gap == 16.0
    assert report.is_good
    assert not replace(report, problems=["a hang"]).is_good
    assert json.loads(json.dumps(report.plain()))["verdict"]["lost"] == []
