"""The verdict on a run in which things were killed, from the ledger alone.

What workers know of their updates stands in their ``outbox.json``, and what the run knows in its newest checkpoint
and its history. No log line is read, and no time is measured.

A worker has one update in hand at any time. So of the ids that one life of it gave out, all but the last are
certainly confirmed, and the last is if the outbox has counted it. Otherwise it is *indeterminate*: it may be applied
or not, but not twice.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.checkpoint import CheckpointStore
from aggregator.core.ledger import Ledger
from aggregator.core.snapshot import Snapshot
from aggregator.history import read_history
from broker.messages import Array, UpdateId, parameters_digest
from tests.support.tasks import CELLS

__all__ = ["Knowledge", "Verdict", "judge", "judge_history"]

#: How many ids a problem names.
SHOWN = 10


class Knowledge:
    """What the workers know, collected from their folders after each of their deaths."""

    def __init__(self) -> None:
        self.issued: set[UpdateId] = set()
        self.confirmed: set[UpdateId] = set()
        self.problems: list[str] = []
        self._seen: dict[tuple[str, str], tuple[int, int]] = {}

    def collect(self, outbox: Path) -> None:
        """Take in an outbox whose worker is dead. Not to be missed before the worker is started again."""
        if not outbox.exists():
            return
        content = json.loads(outbox.read_text())
        worker, incarnation = str(content["worker"]), str(content["incarnation"])
        end, count = int(content["next_seq"]), int(content["confirmed"])
        begin, counted = self._seen.get((worker, incarnation), (0, 0))
        if end < begin or count < counted:
            self.problems.append(f"{worker}/{incarnation} went back from {begin} ids to {end}: they may come twice")
        self._seen[worker, incarnation] = end, count
        ids = [UpdateId(worker, incarnation, seq) for seq in range(begin, end)]
        self.issued.update(ids)
        self.confirmed.update(ids if count - counted >= len(ids) else ids[:-1])

    @property
    def indeterminate(self) -> set[UpdateId]:
        """Ids of which no worker knows what became of them."""
        return self.issued - self.confirmed


@dataclass
class Verdict:
    """What became of the updates, and everything that is not as it must be."""

    issued: int
    confirmed: int
    indeterminate: int
    applied: int
    settled: int
    """Of the indeterminate ones, those that are applied."""
    versions: int
    lost: list[UpdateId] = field(default_factory=list)
    """Confirmed and not applied."""
    doubled: list[UpdateId] = field(default_factory=list)
    """Applied more than once, as far as the history tells."""
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        """Nothing lost, nothing doubled, and everything agrees."""
        return not (self.lost or self.doubled or self.problems)

    def require_good(self) -> None:
        """Raise AssertionError that says what is wrong."""
        assert self.is_good, "\n".join([str(self), *self.problems])


def judge(store: CheckpointStore, history: Path, knowledge: Knowledge) -> Verdict:
    """Compare the newest checkpoint, the history and what the workers know. Nobody may be at work any more."""
    snapshot = store.load()
    lines = list(read_history(history))
    versions = [line for line in lines if line["kind"] == "version"]
    applied = set(Ledger(snapshot.ledger))
    counts = Counter(_told(versions, snapshot))
    verdict = Verdict(
        issued=len(knowledge.issued),
        confirmed=len(knowledge.confirmed),
        indeterminate=len(knowledge.indeterminate),
        applied=len(applied),
        settled=len(applied & knowledge.indeterminate),
        versions=snapshot.version,
        lost=sorted(knowledge.confirmed - applied),
        doubled=sorted(update for update, count in counts.items() if count > 1),
        problems=list(knowledge.problems),
    )
    _note(verdict, "applied without having been given out", applied - knowledge.issued)
    _note(verdict, "in the ledger and not in the history", applied - counts.keys())
    _note(verdict, "in the history and not in the ledger", counts.keys() - applied)
    verdict.problems += _miscounted(snapshot, applied)
    verdict.problems += judge_history(versions, snapshot)
    return verdict


def _told(versions: Iterable[dict[str, Any]], snapshot: Snapshot) -> list[UpdateId]:
    """Every update that the history names, and those of the round in the making."""
    told = [UpdateId(u["worker"], u["incarnation"], u["seq"]) for line in versions for u in line["updates"]]
    return told + [entry.id for entry in snapshot.entries]


def _note(verdict: Verdict, what: str, ids: set[UpdateId]) -> None:
    if ids:
        shown = ", ".join(str(update) for update in sorted(ids)[:SHOWN])
        verdict.problems.append(f"{len(ids)} updates {what}: {shown}")


def _miscounted(snapshot: Snapshot, applied: set[UpdateId]) -> list[str]:
    """Cells of the model, with the round in the making, that are not the number of applied updates.

    A cell that is a row must be that number everywhere.
    """
    newest = snapshot.parameters["cells"].astype(np.float64)
    cells = (newest + snapshot.accumulator.tensors.get("cells", np.zeros_like(newest))).reshape(CELLS, -1)
    counts = Counter(update.worker for update in applied)
    expected = [float(counts.pop(f"w{index}", 0)) for index in range(CELLS)]
    problems = [f"updates of {worker}, which has no cell" for worker in counts]
    return problems + [
        f"cell {index} holds {_span(cell)}, and {count:.0f} updates of w{index} are in the ledger"
        for index, (cell, count) in enumerate(zip(cells, expected, strict=True))
        if np.any(cell != count)
    ]


def _span(cell: Array) -> str:
    return f"{cell.min()}" if cell.min() == cell.max() else f"{cell.min()} to {cell.max()}"


def judge_history(versions: Sequence[dict[str, Any]], snapshot: Snapshot) -> list[str]:
    """Make the run again from its history, one update after the other, and compare every version bit for bit."""
    problems: list[str] = []
    cells = np.zeros(CELLS)
    if [line["version"] for line in versions] != list(range(1, snapshot.version + 1)):
        problems.append(f"the history's versions are not 1 to {snapshot.version}, each once")
    for line in versions:
        if line["before"] != _digest(cells, snapshot):
            problems.append(f"version {line['version']} does not start from the version before it")
        total = np.zeros(CELLS)
        for update in line["updates"]:
            total[int(update["worker"].removeprefix("w"))] += update["weight"]
        cells = cells - line["settings"]["learning_rate"] * -(total / len(line["updates"]))
        if line["after"] != _digest(cells, snapshot):
            problems.append(f"version {line['version']} is not what its updates make")
    if snapshot.digest != _digest(cells, snapshot):
        problems.append("the checkpoint's parameters are not those of the history's last version")
    return problems[:SHOWN]


def _digest(cells: Array, snapshot: Snapshot) -> str:
    """Of parameters that hold ``cells``, in the form of those of ``snapshot``."""
    like = snapshot.parameters["cells"]
    spread = np.empty_like(like)
    spread.reshape(CELLS, -1)[:] = cells[:, None]
    return parameters_digest({"cells": spread})
