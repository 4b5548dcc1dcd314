"""Cosines of updates with what their round made of them: how near they come, and that they survive."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from aggregator.core import sketch as module
from aggregator.core.rounds import Buffered
from aggregator.core.sketch import BUCKETS, Sketcher, Sketches
from aggregator.core.snapshot import VersionRecord
from aggregator.history import version_line, version_record
from aggregator.lineage import Replay
from aggregator.rollback import open_lineage
from broker.errors import LineageError
from broker.messages import Array, pieces
from broker.wire.encoded import compressed
from tests.support.builders import rules_of, snapshot_of, spec_of, update_of, vector
from tests.support.ondisk import OnDisk
from tests.unit.aggregator.driver import Driver

Values = dict[str, Array]


def cosine(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    a, b = (np.concatenate([np.ravel(x).astype(np.float64) for x in v.values()]) for v in (one, other))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def estimated(one: Mapping[str, Array], other: Mapping[str, Array]) -> float:
    a, b = (Sketcher(spec_of(v)).of(v).astype(np.float64) for v in (one, other))
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def dense(source: np.random.Generator) -> Values:
    return {"w": source.standard_normal((300, 700)), "b": 5 * source.standard_normal(700)}


def sparse(source: np.random.Generator) -> Values:
    """One element in a hundred, as after topk."""
    kept = source.random((400, 500)) < 0.01
    return {"w": np.where(kept, source.standard_normal(kept.shape), 0.0)}


def in_few_rows(source: np.random.Generator) -> Values:
    """As of an embedding, in rows of 1024, the number of buckets."""
    rows = source.random((400, 1)) < 0.1
    return {"w": rows * source.standard_normal((400, BUCKETS)), "bias": 3 * source.standard_normal(50)}


def of_rank_one(source: np.random.Generator) -> Values:
    return {"w": np.outer(source.standard_normal(400), source.standard_normal(BUCKETS))}


def of_one_sign(source: np.random.Generator) -> Values:
    return {"w": 1 + 0.5 * source.standard_normal((20, 10_000))}


def of_unlike_layers(source: np.random.Generator) -> Values:
    """All of the length in a small one."""
    return {
        "large": 0.01 * source.standard_normal(500_000),
        "small": source.standard_normal(300),
        "c": source.random(7),
    }


@pytest.mark.parametrize("kind", [dense, sparse, in_few_rows, of_rank_one, of_one_sign, of_unlike_layers])
def test_the_estimate_is_near_the_cosine(kind: object) -> None:
    """Four standard deviations of a sketch, 0.03 at most, and what the sample adds."""
    assert callable(kind)
    errors = []
    for seed in range(3):
        source = np.random.default_rng(seed)
        common, one, other = (kind(source) for _ in range(3))
        for share in (0.0, 0.5, 0.9):
            a, b = ({n: share * common[n] + (1 - share) * v[n] for n in v} for v in (one, other))
            errors.append(estimated(a, b) - cosine(a, b))

    assert max(map(abs, errors)) < 0.16, errors
    assert np.sqrt(np.mean(np.square(errors))) < 0.055, errors


def test_it_is_exact_for_small_models_and_for_an_update_and_itself() -> None:
    source = np.random.default_rng(1)
    small, other = ({"w": source.random((30, 30)), "b": source.random(3)} for _ in range(2))
    large = dense(source)

    assert estimated(small, other) == pytest.approx(cosine(small, other), abs=1e-6)
    assert estimated(large, {name: -2 * array for name, array in large.items()}) == pytest.approx(-1, abs=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64])
def test_an_update_in_pieces_has_the_sketch_of_the_same_values(dtype: type) -> None:
    source = np.random.default_rng(2)
    values: Values = {
        "w": source.standard_normal((300, 400)).astype(dtype),
        "b": source.standard_normal(9).astype(dtype),
    }
    model = spec_of(values)
    encoded = compressed(model, values, "int8", 0)
    decoded = {name: np.concatenate([piece.copy() for piece in pieces(v)]) for name, v in encoded.items()}
    sketcher = Sketcher(model)

    watched = sketcher.watch(encoded)
    for piece in pieces(watched["w"]):
        assert piece.size
    in_pieces = sketcher.sketch()

    np.testing.assert_array_equal(in_pieces, sketcher.of(decoded))


@pytest.mark.parametrize("length", [97, 1024, 4096, 8192, 100_000])
def test_how_an_update_is_cut_into_pieces_makes_no_difference(length: int) -> None:
    values = {"w": np.random.default_rng(3).standard_normal(200_000).astype(np.float32)}
    sketcher = Sketcher(spec_of(values))
    whole = sketcher.of(values)

    sketcher.watch({"w": np.zeros_like(values["w"])})
    for start in range(0, 200_000, length):
        sketcher.take("w", start, values["w"][start : start + length])

    np.testing.assert_array_equal(sketcher.sketch(), whole)


def test_statistics_and_counters_have_no_part() -> None:
    values: Values = {"w": vector(1, 2), "variance": vector(1000), "batches": np.array(7)}
    sketcher = Sketcher(spec_of(values, ("variance", "batches")))

    np.testing.assert_array_equal(sketcher.of(values), [1, 2])


# ------------------------------------------------------------------------------------------------ in a run


def test_a_version_tells_how_far_each_update_agreed() -> None:
    driver = Driver(rules_of(rounds=Buffered(size=3, max_staleness=9)), snapshot_of({"w": vector(0, 0)}))
    for worker, values in [("a", (1, 0)), ("b", (1, 1)), ("c", (-1, 2))]:
        driver.update(update_of({"w": vector(*values)}, worker=worker))
    driver.update(update_of({"w": vector(0, 0)}, worker="still", base_version=1))
    driver.update(update_of({"w": vector(3, 4)}, worker="a", seq=1, base_version=1))
    driver.update(update_of({"w": vector(-3, -4)}, worker="b", seq=1, base_version=1))

    # The sums are (1, 3) and 0.
    cosines = [[entry.cosine for entry in record.updates] for record in driver.records]
    assert cosines[0] == pytest.approx([1 / 10**0.5, 4 / 20**0.5, 5 / 50**0.5], abs=1e-6)
    assert cosines[1] == [None, None, None]


def test_of_parameters_what_counts_is_the_way_from_the_version(tmp_path: Path) -> None:
    start = {"w": np.full((40, 50), 7, np.float32)}
    one, other = (OnDisk(tmp_path / mode, start, buffer_size=2, mode=mode) for mode in ("delta", "parameters"))
    for seed, worker in enumerate("ab"):
        delta = one.random(seed)
        one.publish(worker, delta)
        other.publish(worker, {name: start[name] + array for name, array in delta.items()})
        one.settle()
        other.settle()

    one.close()
    other.close()
    cosines = [[entry["cosine"] for entry in run.lines()[0]["updates"]] for run in (one, other)]
    assert cosines[0] == pytest.approx(cosines[1], abs=1e-4)
    rebuild(other)


def test_a_round_larger_than_the_limit_tells_of_its_first_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 2)
    driver = Driver(rules_of(rounds=Buffered(size=3, max_staleness=9)), snapshot_of({"w": vector(0)}))
    for seq in range(3):
        driver.update(update_of({"w": vector(1)}, seq=seq))

    assert [entry.cosine for entry in driver.records[0].updates] == [1.0, 1.0, None]


MODEL = {"w": np.zeros((40, 50), np.float32)}


def test_cosines_survive_a_restart_in_mid_round_and_come_again_in_a_replay(tmp_path: Path) -> None:
    whole, torn = (OnDisk(tmp_path / name, MODEL, buffer_size=4, commit_count=1) for name in ("whole", "torn"))
    for run in (whole, torn):
        for seed, worker in enumerate("abcd"):
            run.publish(worker, run.random(seed))
            run.settle()
            if run is torn and worker == "b":
                run.restart()
        run.close()

    (one,), (other,) = whole.lines(), torn.lines()
    cosines = [entry["cosine"] for entry in one["updates"]]
    assert all(0.2 < cosine < 0.8 for cosine in cosines)  # of four that have nothing in common
    assert [entry["cosine"] for entry in other["updates"]] == cosines
    rebuild(torn)
    alter(torn, 0.1)
    with pytest.raises(LineageError, match="update b/i/0 agrees"):
        rebuild(torn)


def test_a_checkpoint_of_before_goes_on_without_them(tmp_path: Path) -> None:
    run = OnDisk(tmp_path, MODEL, buffer_size=2, commit_count=1, keep_updates=False)
    run.publish("a", run.random(1))
    run.settle()
    run.store.write(replace(run.store.load(), sketches=()))
    run.restart()
    run.publish("b", run.random(2))
    run.settle()

    (line,) = run.lines()
    assert [entry["cosine"] is None for entry in line["updates"]] == [True, False]


def test_rows_of_another_length_are_not_those_of_this_release() -> None:
    sketches = Sketches(Sketcher(spec_of(MODEL)), [np.zeros(3, np.float32)], 1)

    assert [row.shape for row in sketches.rows] == [(BUCKETS,)]
    assert np.isnan(sketches.rows[0]).all()


def test_a_line_of_before_is_read() -> None:
    driver = Driver(rules_of(), snapshot_of({"w": vector(0)}))
    for seq in range(2):
        driver.update(update_of({"w": vector(1)}, seq=seq))
    line = version_line(driver.records[0])
    for entry in line["updates"]:
        assert entry.pop("cosine") == 1.0

    record: VersionRecord = version_record(line)
    assert [entry.cosine for entry in record.updates] == [None, None]


def rebuild(run: OnDisk) -> None:
    replay = Replay(open_lineage(run.folder, run.store), run.store)
    replay.plan(1)
    for _ in replay.run():
        pass


def alter(run: OnDisk, by: float) -> None:
    file = run.folder / "history.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    next(line for line in lines if line["kind"] == "version")["updates"][1]["cosine"] += by
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
