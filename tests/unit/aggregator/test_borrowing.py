"""Who reads which array for how long, and that nothing of the model's size is copied on the way."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from aggregator.checkpoint import CheckpointStore
from aggregator.checkpointfile import read_checkpoint
from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.machine import RoundMachine
from aggregator.core.rounds import Buffered
from aggregator.core.rules import CommitPolicy
from aggregator.core.screen import is_finite
from aggregator.core.snapshot import Snapshot
from aggregator.core.step import next_parameters
from aggregator.optimizers import Adam, Optimizer, Sgd
from aggregator.staleness import constant
from aggregator.strategies import Mean
from aggregator.strategies.mean import add_scaled
from broker.errors import CheckpointNotWritten, StrategyError
from broker.messages import Array, Mode
from broker.transport import Token
from tests.support.builders import RUN, rules_of, snapshot_of, spec_of, update_of, vector

#: Of a model of 32 MB in four tensors.
MODEL = {name: np.full((2000, 1000), 1.0, np.float32) for name in "abcd"}
NBYTES = sum(array.nbytes for array in MODEL.values())


@contextmanager
def peak() -> Iterator[Callable[[], float]]:
    """Gives the most memory that the block has taken at a time beside what was there, in models."""
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        yield lambda: (tracemalloc.get_traced_memory()[1] - before) / NBYTES
    finally:
        tracemalloc.stop()


# ------------------------------------------------------------------------------------------------- the step


@pytest.mark.parametrize(
    ("optimizer", "models"),
    [(Sgd(0.5), 0.0), (Sgd(0.5, momentum=0.9), 1.0), (Adam(0.1), 2.0)],
    ids=["sgd", "momentum", "adam"],
)
@pytest.mark.parametrize("mode", list(Mode))
def test_a_step_takes_the_memory_of_the_aggregate(optimizer: Optimizer, models: float, mode: Mode) -> None:
    """Beside the parameters, the state and the aggregate, which are there: the new state's share, and blocks."""
    parameters, state = next_parameters(
        spec_of(MODEL), MODEL, _like(MODEL), mode=mode, optimizer=optimizer, state=optimizer.init()
    )
    aggregate = _like(MODEL)

    with peak() as taken:
        next_parameters(spec_of(MODEL), parameters, aggregate, mode=mode, optimizer=optimizer, state=state)
        assert models <= taken() <= models + 0.2

    assert aggregate == {}


@pytest.mark.parametrize("optimizer", [Sgd(0.5), Sgd(0.5, momentum=0.9), Adam(0.1)])
@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64])
def test_a_step_writes_neither_into_what_was_nor_twice_into_what_will_be(optimizer: Optimizer, dtype: Any) -> None:
    tensors = {"w": np.ones(3, dtype), "var": np.ones(3, dtype), "n": np.array(3, np.int64)}
    model, parameters, state = spec_of(tensors, ("var", "n")), tensors, optimizer.init()
    for _ in range(3):
        before = [array.tobytes() for array in _arrays(parameters, state.slots)]
        aggregate = {n: np.ones(a.shape, np.float64 if n == "n" else np.float32) for n, a in tensors.items()}

        after, new = next_parameters(model, parameters, aggregate, mode=Mode.DELTA, optimizer=optimizer, state=state)

        assert [array.tobytes() for array in _arrays(parameters, state.slots)] == before
        assert not _shared([*_arrays(after, new.slots), *_arrays(parameters, state.slots)])
        assert not any(array.flags.writeable for array in after.values())
        parameters, state = after, new


def test_a_step_copies_an_aggregate_that_it_may_not_write_into() -> None:
    total = np.ones((3, 2), np.float32).T
    total.flags.writeable = False

    result, _ = next_parameters(
        spec_of({"w": total}),
        {"w": np.zeros((2, 3), np.float32)},
        {"w": total},
        mode=Mode.DELTA,
        optimizer=Sgd(1.0),
        state=Sgd(1.0).init(),
    )

    np.testing.assert_array_equal(result["w"], np.ones((2, 3)))
    np.testing.assert_array_equal(total, np.ones((2, 3)))


def test_an_aggregate_of_another_shape_is_an_error_that_changes_nothing() -> None:
    parameters = {"w": vector(1, 2), "v": vector(3)}

    with pytest.raises(StrategyError, match=r"v became float32\[2\]; the model has float32\[1\] parameter"):
        next_parameters(
            spec_of(parameters),
            parameters,
            {"w": vector(1, 1), "v": vector(1, 1)},
            mode=Mode.DELTA,
            optimizer=Sgd(1.0),
            state=Sgd(1.0).init(),
        )

    np.testing.assert_array_equal(parameters["w"], [1, 2])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float32, np.float64, np.int8])
@pytest.mark.parametrize("weight", [1.0, 0.7, 30.0])
def test_how_values_are_cut_makes_no_difference(dtype: Any, weight: float) -> None:
    values = (np.random.default_rng(1).standard_normal(600_000) * 9).astype(dtype)
    wide = np.float64 if dtype is np.float64 else np.float32
    expected = np.random.default_rng(2).standard_normal(values.size).astype(wide)
    total = expected.copy()
    np.add(expected, np.multiply(values, weight, dtype=wide, casting="unsafe"), out=expected)

    add_scaled(total, np.split(values, [1, 7, 7, 300_000, 599_999]), weight)

    assert total.tobytes() == expected.tobytes()


@pytest.mark.parametrize(("dtype", "largest"), [(np.float16, 65504.0), (ml_dtypes.bfloat16, 3.38e38)])
def test_half_precision_is_screened_without_a_mask_of_its_size(dtype: Any, largest: float) -> None:
    values = np.zeros(NBYTES // 2, dtype)
    values[:2] = largest, -largest
    with peak() as taken:
        assert is_finite(values)
        assert taken() < 0.1

    for where in (0, values.size // 2, values.size - 1):
        for wrong in (np.inf, -np.inf, np.nan):
            values[where] = wrong
            assert not is_finite(values)
        values[where] = 0


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_all_numbers_of_half_precision_are_screened_as_numpy_does(dtype: Any) -> None:
    numbers = np.arange(2**16, dtype=np.uint16).view(dtype)

    with np.errstate(invalid="ignore"):
        expected = np.isfinite(numbers).tolist()
    assert [is_finite(numbers[n : n + 1]) for n in range(numbers.size)] == expected
    assert is_finite(numbers[:0])


# ------------------------------------------------------------------------------------------------ the machine


class Folding:
    """A machine in mid-round, with a checkpoint on its way after each update that none was on its way for."""

    def __init__(self, size: int = 8) -> None:
        rules = rules_of(
            rounds=Buffered(size=size, max_staleness=9),
            strategy=Mean("uniform", constant()),
            commit=CommitPolicy(count=1),
            retry_seconds=1.0,
        )
        self.machine = RoundMachine(rules, snapshot_of({"w": vector(0, 0)}), 0.0)
        self.seq = 0
        self.now = 0.0
        self.written: list[do.WriteCheckpoint] = []
        self.send(on.LinkUp(1))

    def send(self, event: on.Happening) -> list[do.Effect]:
        effects = self.machine.handle(event, self.now)
        self.written += [effect for effect in effects if isinstance(effect, do.WriteCheckpoint)]
        return effects

    def fold(self) -> None:
        self.seq += 1
        update = update_of({"w": vector(1, 2)}, seq=self.seq)
        self.send(on.Arrived(Token(1, self.seq), update, 8))

    def lends(self) -> bool:
        return self.machine.lends

    def trails(self) -> bool:
        return self.machine.trails

    @property
    def sums(self) -> Array:
        return self.machine._buffer.accumulator.tensors["w"]


def test_an_accumulator_that_is_lent_is_copied_and_one_that_was_given_back_is_not() -> None:
    run = Folding()
    run.fold()
    (first,) = run.written
    assert run.lends()
    lent = run.sums

    run.fold()
    assert run.sums is not lent
    np.testing.assert_array_equal(lent, [1, 2])
    np.testing.assert_array_equal(run.sums, [2, 4])

    run.send(on.CheckpointWritten(first.commit))
    assert run.lends()
    lent = run.sums
    run.send(on.CheckpointCopied(run.written[1].commit))
    assert not run.lends()
    run.fold()
    assert run.sums is lent
    # What is told of the snapshot stays: its file has been begun.
    assert run.written[1].snapshot.accumulator.count == len(run.written[1].snapshot.entries) == 2


def test_what_is_folded_after_a_copy_is_in_the_next_snapshot_if_the_first_fails() -> None:
    run = Folding()
    run.fold()
    run.send(on.CheckpointCopied(run.written[0].commit))
    run.fold()

    run.send(on.CheckpointFailed(run.written[0].commit, "disk full"))
    run.now = 5.0
    run.send(on.Tick())

    again = run.written[1].snapshot
    assert (len(again.entries), again.accumulator.count) == (2, 2)
    np.testing.assert_array_equal(again.accumulator.tensors["w"], [2, 4])
    effects = run.send(on.CheckpointWritten(run.written[1].commit))
    assert [effect.token.tag for effect in effects if isinstance(effect, do.Ack)] == [1, 2]


def test_a_copy_of_another_checkpoint_gives_nothing_back() -> None:
    run = Folding()
    run.fold()

    for commit in (run.written[0].commit - 1, run.written[0].commit + 1):
        run.send(on.CheckpointCopied(commit))

    assert run.lends()


def test_a_version_with_a_successor_is_let_go_of_and_the_successor_is_broadcast_when_it_is_durable() -> None:
    run = Folding(size=1)
    run.fold()
    assert run.machine.version == 1
    assert run.machine._versions.durable.parameters == {}

    assert not any(isinstance(effect, do.Broadcast) for effect in run.send(on.LinkUp(2)))
    effects = run.send(on.CheckpointWritten(run.written[0].commit))

    assert [effect.version for effect in effects if isinstance(effect, do.Broadcast)] == [1]
    assert any(isinstance(effect, do.Broadcast) for effect in run.send(on.LinkUp(3)))


def test_a_fold_beside_two_versions_can_be_told() -> None:
    run = Folding(size=2)
    run.fold()
    run.fold()
    assert run.machine.version == 1
    assert run.trails(), "the checkpoint of the partial round reads version 0"

    run.fold()
    assert not run.trails(), "its accumulator is there"
    run.send(on.CheckpointWritten(run.written[0].commit))
    assert not run.trails()


# --------------------------------------------------------------------------------------------- the checkpoint


@pytest.fixture
def store(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "checkpoints", RUN)
    store.create(spec_of(MODEL), MODEL, now=1.0)
    return store


def mid_round(store: CheckpointStore) -> Snapshot:
    machine = RoundMachine(rules_of(rounds=Buffered(size=9, max_staleness=9)), store.claim(), 0.0)
    machine.handle(on.Arrived(Token(1, 1), update_of(MODEL), NBYTES), 0.0)
    return machine.snapshot(1.0)


def test_the_accumulator_is_given_back_when_it_is_written_and_before_anything_is_synced(
    store: CheckpointStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = mid_round(store)
    steps: list[str] = []
    fsync = os.fsync

    def recording(handle: int) -> None:
        steps.append("fsync")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", recording)

    def copied() -> None:
        steps.append("copied")
        for array in snapshot.accumulator.tensors.values():
            array.fill(-7)  # as a fold would, from now on

    file = store.write(snapshot, copied)

    assert steps[:2] == ["copied", "fsync"]
    assert steps.count("copied") == 1
    read = read_checkpoint(file)
    for name, array in MODEL.items():
        np.testing.assert_array_equal(read.accumulator.tensors[name], array)


def test_nothing_is_given_back_that_was_not_lent_or_not_written(store: CheckpointStore) -> None:
    calls: list[str] = []
    snapshot = store.claim()
    store.write(snapshot, lambda: calls.append("no accumulator"))

    snapshot = mid_round(store)
    store.folder.rename(store.folder.with_name("away"))
    store.folder.touch()
    with pytest.raises(CheckpointNotWritten):
        store.write(snapshot, lambda: calls.append("no file"))

    assert calls == []


def test_a_checkpoint_is_read_into_the_memory_of_its_arrays_and_looked_at_in_none(store: CheckpointStore) -> None:
    store.write(mid_round(store))

    with peak() as taken:
        snapshot = store.load()
        assert 2.0 <= taken() <= 2.1
    with peak() as taken:
        head = store.head()
        assert taken() < 0.01

    assert (head.version, head.entries, head.model) == (snapshot.version, snapshot.entries, snapshot.model)


def test_a_claim_and_a_start_take_the_memory_of_the_checkpoint(store: CheckpointStore) -> None:
    store.write(mid_round(store))

    with peak() as taken:
        machine = RoundMachine(rules_of(rounds=Buffered(size=9, max_staleness=9)), store.claim(), 0.0)
        machine.handle(on.LinkUp(1), 0.0)
        assert taken() <= 2.1

    assert machine.fill == 1


# ------------------------------------------------------------------------------------------------------ words


def _like(tensors: dict[str, Array]) -> dict[str, Array]:
    return {name: np.full_like(array, 0.25) for name, array in tensors.items()}


def _arrays(parameters: Any, slots: Any) -> list[Array]:
    return [*parameters.values(), *(array for slot in slots.values() for array in slot.values())]


def _shared(arrays: list[Array]) -> bool:
    return any(np.shares_memory(one, other) for i, one in enumerate(arrays) for other in arrays[:i])
