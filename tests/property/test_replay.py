"""Whatever a run went through, its versions can be rebuilt, and come out bit for bit as they were."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from aggregator.config import AggregatorConfig
from aggregator.lineage import Replay
from aggregator.rollback import adopt, find_checkpoint, open_lineage, roll_back
from broker.errors import ConfigError, StrategyError
from tests.support.ondisk import OnDisk

WORKERS = ("w0", "w1", "w2")
DTYPES = (np.float16, np.float32, np.float64, ml_dtypes.bfloat16)

#: What an operator may change while a run goes on, or between two starts.
CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "buffer_size": st.integers(1, 4),
        "strategy": st.sampled_from(["mean", "median"]),
        "weighting": st.sampled_from(["uniform", "examples"]),
        "staleness": st.sampled_from(["polynomial", "constant", "hinge", "exponential", "cutoff"]),
        "staleness_exponent": st.sampled_from([0.0, 0.5, 1.7]),
        "optimizer": st.sampled_from(["sgd", "adam", "adamw", "yogi", "lamb"]),
        "learning_rate": st.sampled_from([0.1, 0.7, 1.0]),
        "momentum": st.sampled_from([0.0, 0.9]),
        "weight_decay": st.sampled_from([0.0, 0.1]),
        "normalize_staleness": st.booleans(),
        "staleness_threshold": st.integers(0, 2),
        "fairness": st.sampled_from(["none", "inverse-rate"]),
        "fairness_window": st.integers(2, 4),
        "schedule": st.sampled_from(["constant", "step", "cosine"]),
        "schedule_rounds": st.integers(3, 9),
        "warmup_rounds": st.integers(0, 2),
    },
)

#: Worker, by how many versions it is late, examples, and whether the disk keeps up.
UPDATE = st.tuples(
    st.sampled_from(WORKERS), st.sampled_from([0, 0, 1, 3]), st.integers(1, 4), st.sampled_from([True, True, False])
)
UPDATES = st.tuples(st.just("updates"), st.lists(UPDATE, min_size=1, max_size=8))
STEPS = st.one_of(
    UPDATES,
    UPDATES,
    UPDATES,
    st.tuples(st.just("order"), CHANGES),
    st.tuples(st.just("restart"), CHANGES),
    st.tuples(st.just("explode"), st.sampled_from(WORKERS)),
    st.tuples(st.just("roll back"), st.integers(1, 4), st.booleans()),
    st.tuples(st.just("leave out"), st.sampled_from(WORKERS), st.integers(0, 2)),
)


class Life:
    """A run that is changed, killed, taken back and rebuilt."""

    def __init__(self, folder: Path, dtype: Any, mode: str, commit: int, strategy: str) -> None:
        self.folder = folder
        tensors = {
            "weight": np.random.default_rng(7).standard_normal((3, 2)).astype(dtype),
            "bias": np.zeros((), dtype),
            "variance": np.ones(2, np.float32),
            "batches": np.zeros((), np.int64),
        }
        buffers = ("variance", "batches")
        self.run = OnDisk(
            folder,
            tensors,
            buffers=buffers,
            mode=mode,
            commit_count=commit,
            max_staleness=1000,
            strategy="mean" if mode == "parameters" else strategy,
            buffer_size=3,
            schedule_rounds=5,
        )
        self.seed = 0

    def do(self, step: tuple[Any, ...]) -> None:
        match step:
            case ("updates", updates):
                for worker, lag, examples, keeps_up in updates:
                    self.seed += 1
                    self.update(worker, self.run.random(self.seed, 0.3), lag, examples, keeps_up)
            case ("explode", worker):
                for _ in range(5):
                    self.update(worker, self.run.random(0, 1e30), 0, 1, keeps_up=True)
            case ("order", changes) if self.go_together({}, changes):
                self.run.order(**changes)
            case ("restart", changes) if self.go_together(changes, {}):
                self.run.restart(**changes)
            case ("roll back", by, from_file):
                self.roll_back(by, from_file)
            case ("leave out", worker, back):
                self.leave_out(worker, back)

    def go_together(self, settings: dict[str, Any], changes: dict[str, Any]) -> bool:
        """Whether these settings at a restart, or these changes, are accepted; whoever gives them is told if not."""
        controls = self.run.machine.controls
        try:
            config = AggregatorConfig.model_validate({**self.run.config.model_dump(exclude_unset=True), **settings})
            for earlier in (controls.changes, controls.newest):
                config.changed({**earlier, **changes})
        except (ConfigError, ValidationError):
            return False
        return True

    def update(self, worker: str, tensors: Any, lag: int, examples: int, keeps_up: bool) -> None:
        self.run.publish(worker, tensors, lag=lag, examples=examples)
        try:
            self.run.deliver()
            if keeps_up:
                self.run.settle()
        except StrategyError:  # too many in a row: the aggregator stops, and is started again
            self.run.restart()

    def roll_back(self, by: int, from_file: bool) -> None:
        store = self.run.store
        lineage = open_lineage(self.folder, store)
        version = lineage.newest - by
        if version < 0:
            return
        state = find_checkpoint(lineage, store, version) if from_file else None
        if state is None:
            result = self.rebuilt(version).result
            roll_back(lineage, store, version, result.parameters, result.optimizer)
        else:
            roll_back(lineage, store, version, state.parameters, state.optimizer)
        self.run.restart()

    def leave_out(self, worker: str, back: int) -> None:
        newest = self.run.store.load().version
        replay = self.rebuilt(max(0, newest - back), worker)
        if any(replay.result.left_out.values()):
            adopt(replay, self.run.store, frozenset({worker}), go_on=not back, report=lambda _: None)
            self.run.restart()

    def rebuilt(self, version: int, *leave_out: str) -> Replay:
        """Rebuild ``version``; each version's digest is compared with the history's on the way."""
        replay = Replay(open_lineage(self.folder, self.run.store), self.run.store, frozenset(leave_out))
        replay.plan(version)
        for _ in replay.run():
            pass
        assert replay.result.version == version
        return replay

    def judge(self) -> None:
        """All versions can be rebuilt, also those that were taken back."""
        durable = self.run.store.load()
        lineage = open_lineage(self.folder, self.run.store)
        assert lineage.rebuildable() == list(range(durable.version + 1))
        for version in range(durable.version + 1):
            replay = self.rebuilt(version)
            assert replay.base_version == 0
            state = find_checkpoint(lineage, self.run.store, version)
            assert state is None or state.digest == replay.original.digest
        assert self.rebuilt(durable.version).original.digest == durable.digest


@settings(max_examples=100, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    mode=st.sampled_from(["delta", "gradient", "parameters"]),
    commit=st.integers(1, 3),
    strategy=st.sampled_from(["mean", "median"]),
    steps=st.lists(STEPS, min_size=5, max_size=20),
)
def test_every_version_can_be_rebuilt_bit_for_bit(
    dtype: Any, mode: str, commit: int, strategy: str, steps: list[tuple[Any, ...]]
) -> None:
    # What the disk has is not lost here, so nothing needs to be synced.
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(os, "fsync"):
        life = Life(Path(folder), dtype, mode, commit, strategy)
        try:
            for step in steps:
                life.do(step)
            life.run.write()
            life.judge()
        finally:
            life.run.close()
