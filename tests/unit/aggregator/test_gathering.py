"""Strategies that need all updates of a round: kept on disk, through restarts, damage, full disks and replays."""

from __future__ import annotations

import logging
import threading
import tracemalloc
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator import service
from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core.machine import RoundMachine
from aggregator.core.rounds import Buffered
from aggregator.inspection import check_snapshot
from aggregator.lineage import Replay
from aggregator.rollback import open_lineage, roll_back
from aggregator.rowfile import HEAD, RowFile
from aggregator.service import AggregatorService
from aggregator.spool import DiskSpool
from aggregator.staleness import constant, polynomial
from aggregator.strategies import STRATEGIES, Gather, Mean
from aggregator.strategies.base import begin, gathers
from aggregator.strategies.rows import BLOCK_BYTES, Rows
from aggregator.strategies.rules.base import Occasion
from aggregator.strategies.rules.median import Median
from aggregator.verification import Verification
from broker.errors import CheckpointNotWritten, ConfigError, StrategyError
from broker.memory import MemoryBroker
from broker.messages import Array
from broker.settings import load
from broker.transport import Outgoing
from broker.wire import encode
from tests.support.builders import RUN, rules_of, snapshot_of, spec_of, update_of, vector
from tests.support.ondisk import OnDisk
from tests.support.smalldisk import small_disk
from tests.support.waiting import wait_for
from tests.unit.aggregator.driver import Driver

TENSORS = {"w": vector(0, 0), "mean": vector(0), "b": np.zeros((), np.float32), "n": np.zeros((), np.int64)}
BUFFERS = ("mean", "n")
MEDIAN = Gather(Median(), constant())


def like(value: float) -> dict[str, Array]:
    return {
        "w": vector(value, -value),
        "mean": vector(value),
        "b": np.array(10 * value, np.float32),
        "n": np.array(int(value), np.int64),
    }


# ----------------------------------------------------------------------------------------------------- the numbers


def driver(strategy: Any, size: int = 3) -> Driver:
    rules = rules_of(rounds=Buffered(size=size, max_staleness=9), strategy=strategy)
    return Driver(rules, snapshot_of(TENSORS, buffers=BUFFERS))


def test_parameters_are_the_median_and_the_rest_is_averaged() -> None:
    run = driver(MEDIAN)
    for seq, value in enumerate((1.0, 100.0, 4.0)):
        run.update(update_of(like(value), seq=seq, buffers=BUFFERS))

    np.testing.assert_array_equal(run.parameters["w"], [4, -4])
    np.testing.assert_array_equal(run.parameters["b"], 40)
    np.testing.assert_array_equal(run.parameters["mean"], [35])
    np.testing.assert_array_equal(run.parameters["n"], 35)
    assert [entry.weight for entry in run.records[0].updates] == [1, 1, 1]


def test_a_stale_update_goes_in_with_its_weight() -> None:
    run = driver(Gather(Median(), polynomial(1.0)), size=1)
    run.update(update_of(like(2), seq=0, buffers=BUFFERS))
    run.update(update_of(like(2), seq=1, buffers=BUFFERS))  # one version late

    np.testing.assert_array_equal(run.parameters["w"], [3, -3])
    assert [record.updates[0].weight for record in run.records] == [1, 0.5]


class MeanOfRows:
    """A rule that is no different from the mean."""

    remembers = False

    def least(self) -> int:
        return 1

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        return np.asarray(rows.block(0, rows.size).mean(axis=0, dtype=np.float64), rows.dtype)


def test_the_mean_of_all_rows_is_the_mean() -> None:
    weight = polynomial(0.5)
    runs = driver(Mean("uniform", weight), size=4), driver(Gather(MeanOfRows(), weight), size=4)
    for seq in range(12):
        source = np.random.default_rng(seq)
        tensors = {**like(seq), "w": source.standard_normal(2).astype(np.float32)}
        for run in runs:
            base = max(0, run.machine.version - seq % 3)
            run.update(update_of(tensors, seq=seq, base_version=base, examples=seq + 1, buffers=BUFFERS))

    for name, array in runs[0].parameters.items():
        np.testing.assert_allclose(runs[1].parameters[name], array, rtol=2e-6)
    assert runs[0].machine.version == 3


def test_a_rule_of_another_shape_makes_no_version_and_is_named() -> None:
    class Short(MeanOfRows):
        def __call__(self, rows: Rows, occasion: Occasion) -> Array:
            return rows.row(0)[:-1]

        def __repr__(self) -> str:
            return "Short()"

    strategy = Gather(Short(), constant())
    run = driver(strategy, size=1)
    for seq in range(4):
        run.update(update_of(like(1), seq=seq, buffers=BUFFERS))
    assert all(record.source is not None for record in run.records)
    assert any("Short() gave an array of shape (2,); it must be (3,)" in str(fact) for fact in run.facts)
    with pytest.raises(StrategyError, match="must be"):
        run.update(update_of(like(1), seq=9, buffers=BUFFERS))


def test_a_rule_is_told_of_the_run_and_the_version() -> None:
    told: list[Occasion] = []

    class Listening(MeanOfRows):
        def __call__(self, rows: Rows, occasion: Occasion) -> Array:
            told.append(occasion)
            return super().__call__(rows, occasion)

    rules = rules_of(rounds=Buffered(size=1, max_staleness=9), strategy=Gather(Listening(), constant()), seed=5)
    run = Driver(rules, snapshot_of(TENSORS, buffers=BUFFERS))
    for seq in range(2):
        run.update(update_of(like(1), seq=seq, buffers=BUFFERS))
    assert [(occasion.seed, occasion.version) for occasion in told] == [(5, 0), (5, 1)]


# -------------------------------------------------------------------------------------------------------- on disk


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., OnDisk]]:
    made: list[OnDisk] = []

    def make(**config: Any) -> OnDisk:
        settings = {"strategy": "median", "buffer_size": 3, "commit_count": 1, "staleness": "constant", **config}
        made.append(OnDisk(tmp_path, TENSORS, buffers=BUFFERS, **settings))
        return made[-1]

    yield make
    for run in made:
        run.close()


def arrive(run: OnDisk, value: float, worker: str = "a") -> None:
    run.publish(worker, like(value))
    run.settle()


def row_files(run: OnDisk) -> list[str]:
    return sorted(file.name for file in run.store.folder.glob("*.rows"))


def test_a_round_goes_on_after_a_crash_with_the_rows_that_are_on_disk(make: Callable[..., OnDisk]) -> None:
    run = make()
    arrive(run, 1)
    run.restart()
    arrive(run, 100)
    run.restart()
    assert run.store.load().accumulator.rows is not None
    assert row_files(run) == ["00000001-000001.rows", "00000002-000001.rows"]

    arrive(run, 4)

    np.testing.assert_array_equal(run.machine.parameters["w"], [4, -4])
    np.testing.assert_array_equal(run.machine.parameters["mean"], [35])
    assert run.store.load().accumulator.rows is None


def test_an_update_that_was_not_durable_comes_again_and_counts_once(make: Callable[..., OnDisk]) -> None:
    run = make(commit_count=2)
    for value in (1, 2):
        run.publish("a", like(value))
        run.deliver()
    run.restart()  # the checkpoint had not been written
    assert run.machine.fill == 0

    run.settle()
    arrive(run, 30)

    assert run.version == 1
    np.testing.assert_array_equal(run.machine.parameters["w"], [2, -2])


def test_files_of_rounds_that_are_over_are_deleted(make: Callable[..., OnDisk]) -> None:
    run = make(keep_updates=False)
    run.store._keep = 2
    for value in range(15):
        arrive(run, value)

    # Of the round before, whose checkpoints are fallen back to, at the most.
    assert run.version == 5
    assert len(row_files(run)) <= 2
    arrive(run, 1)
    run.order(strategy="mean")
    for value in range(9):
        arrive(run, value)
    assert row_files(run) == []


@pytest.mark.parametrize("how", ["bit", "torn", "missing", "head"])
def test_a_damaged_row_falls_back_as_a_damaged_checkpoint_does(
    make: Callable[..., OnDisk], how: str, caplog: pytest.LogCaptureFixture
) -> None:
    run = make()
    arrive(run, 1)
    run.restart()
    arrive(run, 2)
    newest = run.store.files()[0]
    file = run.store.folder / "00000002-000001.rows"
    content = file.read_bytes()
    match how:
        case "bit":
            file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        case "torn":
            file.write_bytes(content[:-1])
        case "missing":
            file.unlink()
        case "head":
            file.write_bytes(b"?" + content[1:])
    checked = Verification(run.folder, run.store)
    checked.files(lambda _facts, _is_sound: None)
    assert file.name in str(checked.findings[0])
    assert "falls back" in str(checked.findings[0])

    run.restart()

    assert "falling back to" in caplog.text
    assert run.machine.fill == 1
    assert newest.with_name(f"{newest.name}.damaged").exists()
    arrive(run, 5)
    arrive(run, 9)
    np.testing.assert_array_equal(run.machine.parameters["w"], [5, -5])
    assert check_snapshot(run.store.load()) == []


def test_a_damaged_first_row_leaves_what_was_before_the_round(make: Callable[..., OnDisk]) -> None:
    run = make()
    for value in (1, 2, 3, 4, 5):
        arrive(run, value)
    assert (run.version, run.machine.fill) == (1, 2)
    (file,) = (run.store.folder / name for name in row_files(run)[-1:])
    content = bytearray(file.read_bytes())
    content[HEAD.size] ^= 1
    file.write_bytes(content)

    run.restart()

    assert (run.version, run.machine.fill) == (1, 0)


def test_rolled_back_in_mid_round_the_rows_are_dropped(make: Callable[..., OnDisk]) -> None:
    run = make()
    for value in (1, 2, 3, 4):
        arrive(run, value)
    before = run.store.load()
    run.close()
    lineage = open_lineage(run.folder, run.store)
    zero = Replay(lineage, run.store)
    zero.plan(0)
    assert list(zero.run()) == []
    roll_back(lineage, run.store, 0, zero.result.parameters, zero.result.optimizer)

    run.start(**run.config.model_dump(exclude_unset=True))

    assert before.accumulator.rows is not None
    assert (run.version, run.machine.fill) == (2, 0)
    assert run.store.load().accumulator.rows is None
    for value in (6, 7, 8):
        arrive(run, value)
    np.testing.assert_array_equal(run.machine.parameters["w"], [7, -7])


def rebuilt(run: OnDisk, version: int, *leave_out: str) -> Replay:
    replay = Replay(open_lineage(run.folder, run.store), run.store, frozenset(leave_out))
    replay.plan(version)
    assert list(replay.run())[-1:] in ([], [version])
    return replay


def test_a_replay_from_a_state_with_rows_in_it_comes_out_bit_for_bit(make: Callable[..., OnDisk]) -> None:
    run = make(keep_updates=False)
    arrive(run, 1, "a")
    run.restart(keep_updates=True)  # a base in mid-round
    for value, worker in ((100, "b"), (4, "c"), (1, "a"), (2, "b"), (3, "c")):
        arrive(run, value, worker)
    assert [file.name for file in (run.folder / "updates").glob("*.rows")] == ["base-0000000000.rows"]

    replay = rebuilt(run, 2)
    assert replay.original.digest == run.store.load().digest
    assert replay.original.parameters["w"].tobytes() == run.machine.parameters["w"].tobytes()
    without = rebuilt(run, 2, "b")
    np.testing.assert_array_equal(without.result.parameters["w"], [(1 + 4) / 2 + 2, -(1 + 4) / 2 - 2])
    np.testing.assert_array_equal(without.original.parameters["w"], [4 + 2, -4 - 2])


def test_a_replay_leaves_nothing_behind(
    make: Callable[..., OnDisk], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    scratch = tmp_path_factory.mktemp("scratch")
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    run = make()
    for value in range(9):
        arrive(run, value)
    replay = Replay(open_lineage(run.folder, run.store), run.store, frozenset({"z"}))
    replay.plan(3)
    most = 0
    for _ in replay.run():
        (folder,) = scratch.iterdir()
        most = max(most, len(list(folder.iterdir())))
    assert most == 0, "a round's rows go with the round"
    assert list(scratch.iterdir()) == []


def test_memory_is_that_of_one_model_and_of_blocks(tmp_path: Path) -> None:
    """An update is written from where it is; the rule makes one model, whatever the number of updates."""
    large = {name: np.full((1000, 1000), 1.0, np.float32) for name in "abcd"}
    model, nbytes = spec_of(large), 16_000_000
    accumulator = begin(MEDIAN, model, DiskSpool(tmp_path, 1))
    taken = []
    tracemalloc.start()
    try:
        for worker in range(7):
            MEDIAN.fold(accumulator, update_of(large, worker=f"w{worker}"), 0)
        taken.append(tracemalloc.get_traced_memory()[1])
        aggregate = MEDIAN.finish(accumulator, model)
        taken.append(tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()

    np.testing.assert_array_equal(aggregate["d"], large["d"])
    assert taken[0] < 0.1 * nbytes
    assert taken[1] < nbytes + 3 * BLOCK_BYTES


# ------------------------------------------------------------------------------------------- another strategy


@pytest.mark.parametrize(("first", "second"), [("mean", "median"), ("median", "mean")])
def test_a_round_that_is_open_at_a_restart_is_closed_as_it_was_begun(
    make: Callable[..., OnDisk], first: str, second: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run = make(strategy=first)
    arrive(run, 1)
    run.restart(strategy=second)
    assert f"the open round goes on with strategy {first};" in caplog.text
    arrive(run, 2)
    run.restart()  # once more: it is still the same round
    results = {"mean": [4.0, -4.0], "median": [2.0, -2.0]}

    arrive(run, 9)
    np.testing.assert_array_equal(run.machine.parameters["w"], results[first])
    for value in (1, 2, 9):
        arrive(run, value)

    np.testing.assert_array_equal(run.machine.parameters["w"], np.add(results[first], results[second]))
    lines = run.lines()
    assert [line["settings"]["strategy"] for line in lines] == [first, second]
    assert rebuilt(run, 2).original.digest == run.store.load().digest


def test_an_operator_changes_the_strategy_from_one_round_to_the_next(make: Callable[..., OnDisk]) -> None:
    run = make(strategy="mean")
    arrive(run, 1)
    run.order(strategy="median")
    assert run.write()
    run.restart()
    for value in (2, 9, 1, 2, 9):
        arrive(run, value)

    np.testing.assert_array_equal(run.machine.parameters["w"], [4 + 2, -4 - 2])


# ----------------------------------------------------------------------------------------------------- full disk


class Running:
    """A service on a thread over the in-process broker; its rows go to a disk that can be full."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, *, size: int = 1, is_full: bool = True) -> None:
        self.is_full = is_full
        self.attempts = 0
        append = RowFile.append

        def sometimes(file: RowFile, values: Iterable[Array]) -> str:
            self.attempts += 1
            if self.is_full:
                raise CheckpointNotWritten("rows: No space left on device; make room")
            return append(file, values)

        monkeypatch.setattr(RowFile, "append", sometimes)
        monkeypatch.setattr(service, "RETRY_SECONDS", 0.05)
        monkeypatch.setattr(service, "IDLE_SECONDS", 0.05)
        self.store = CheckpointStore(folder / "checkpoints", RUN)
        zeros = {"w": np.zeros(size, np.float32)}
        self.store.create(spec_of(zeros), zeros, now=0.0)
        self.broker = MemoryBroker()
        self.broker.run(RUN).declared = True
        config = AggregatorConfig(strategy="median", buffer_size=3, commit_count=1, linger=0.0)
        self.service = AggregatorService(folder=folder, run=RUN, config=config, store=self.store)
        self.errors: list[BaseException] = []
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()
        self._worker = self.broker.worker(RUN, "w0")
        self._worker.open(lambda _item: None)
        self._size, self._seq = size, 0

    def publish(self, *values: float) -> None:
        for value in values:
            tensors = {"w": np.full(self._size, value, np.float32)}
            update = update_of(tensors, seq=self._seq, base_epoch=0)
            self._seq += 1
            self._worker.publish(Outgoing(body=encode(update))).result()

    def _run(self) -> None:
        try:
            self.service.run(self.broker.aggregator(RUN))
        except BaseException as error:  # noqa: BLE001 - handed to the test
            self.errors.append(error)

    @property
    def machine(self) -> RoundMachine:
        assert self.service._led is not None
        return self.service._led.machine

    def stop(self) -> None:
        self.service.stop()
        self.thread.join(20)
        assert not self.thread.is_alive()
        assert self.errors == []


@pytest.fixture
def running(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Running]:
    running = Running(tmp_path, monkeypatch)
    running.publish(1, 100, 4)
    yield running
    if running.thread.is_alive():
        running.stop()


def test_an_update_without_room_waits_and_the_others_behind_it(
    running: Running, caplog: pytest.LogCaptureFixture
) -> None:
    wait_for(lambda: running.attempts >= 3, what="three attempts")
    assert (running.machine.version, running.machine.fill) == (0, 0)
    assert "no room for an update (rows: No space left on device; make room); nothing was acknowledged" in caplog.text
    assert running.store.load().ledger == {}

    running.is_full = False
    wait_for(lambda: running.store.load().version == 1, what="the version")

    running.stop()
    np.testing.assert_array_equal(running.store.load().parameters["w"], [4])
    assert running.broker.depth(RUN) == 0


def test_who_is_asked_to_leave_does_not_wait_for_room(running: Running) -> None:
    wait_for(lambda: running.attempts >= 1, what="an attempt")
    running.stop()
    assert running.broker.depth(RUN) == 3, "back in the queue"


def test_a_disk_that_is_full_in_the_middle_of_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    size = 40_000  # 160 KB a row, and a checkpoint
    with small_disk(tmp_path / "disk", kilobytes=1200) as disk:
        running = Running(disk.folder, monkeypatch, size=size, is_full=False)
        running.publish(1)
        wait_for(lambda: len(running.store.load().entries) == 1, what="a durable row")
        disk.fill()
        with (disk.folder / "filler").open("r+b") as filler:
            filler.truncate((disk.folder / "filler").stat().st_size - 80_000)  # for a half
        running.publish(100, 4)
        wait_for(lambda: caplog.text.count("no room for an update") >= 3, what="three attempts")
        assert sum(file.stat().st_size for file in running.store.folder.glob("*.rows")) < 1.1 * 4 * size

        disk.make_room()
        wait_for(lambda: running.store.load().version == 1, what="the version")
        running.stop()
        np.testing.assert_array_equal(running.store.load().parameters["w"], np.full(size, 4, np.float32))


# ------------------------------------------------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"buffer_size": 2}, "strategy 'median' is of no use below 3 updates: raise buffer_size"),
        ({"weighting": "examples"}, "does not go with weighting 'examples'"),
        ({"deadline": 5.0}, "a round could close with 1: raise minimum_updates"),
        ({"rounds": "synchronous", "minimum_updates": 2}, "a round could close with 2: raise minimum_updates"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], message: str) -> None:
    flags = [(f"aggregator.{name}", value) for name, value in {"strategy": "median", **settings}.items()]
    with pytest.raises(ConfigError, match=message):
        load({"aggregator": AggregatorConfig}, flags=flags, environment={})


@pytest.mark.parametrize("settings", [{}, {"deadline": 5.0, "minimum_updates": 3}, {"weighting": "uniform"}])
def test_what_makes_sense_is_not(settings: dict[str, Any]) -> None:
    config = AggregatorConfig.model_validate({"strategy": "median", **settings})
    assert config.rules().settings["weighting"] == "uniform"
    rounds = {"rounds": "synchronous", "minimum_updates": 3}
    assert AggregatorConfig.model_validate({"strategy": "median", **rounds}).rules().settings["weighting"] == "uniform"


def test_an_operator_cannot_make_the_buffer_too_small() -> None:
    with pytest.raises(ConfigError, match="raise buffer_size"):
        AggregatorConfig(strategy="median").changed({"buffer_size": 2})


def test_all_strategies_that_gather_finish_a_round_on_disk(tmp_path: Path) -> None:
    names = [name for name in STRATEGIES.own if gathers(AggregatorConfig(strategy=name).rules().strategy)]
    assert "median" in names
    for name in names:
        run = OnDisk(tmp_path / name, TENSORS, buffers=BUFFERS, strategy=name, buffer_size=10, commit_count=3)
        for value in range(10):
            arrive(run, value, f"w{value}")
        run.close()
        assert run.store.load().version == 1, name
