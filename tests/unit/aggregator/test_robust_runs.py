"""Robust strategies as a run has them: configured, over restarts, replayed, and what they tell of workers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.config import AggregatorConfig
from aggregator.core import effects as do
from aggregator.lineage import Lineage, Replay
from aggregator.strategies.rules import RULES, Chain, Occasion, RuleSettings, pre_aggregations_of
from broker.errors import ConfigError
from broker.messages import Array
from broker.settings import load
from tests.support.builders import snapshot_of, update_of, vector
from tests.support.ondisk import OnDisk
from tests.support.rows import rows_of
from tests.unit.aggregator.driver import Driver

SIZE = 40


def config(**settings: Any) -> AggregatorConfig:
    flags = [(f"aggregator.{name}", value) for name, value in settings.items()]
    read = load({"aggregator": AggregatorConfig}, flags=flags, environment={})
    return read.table("aggregator", AggregatorConfig)


def updates(count: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).normal(1.0, 1.0, (count, SIZE)).astype(np.float32)


def publish(run: OnDisk, rows: Array) -> None:
    """One update of each worker, in a row."""
    for number, row in enumerate(rows):
        run.publish(f"w{number}", {"a": row[:25].reshape(5, 5), "b": row[25:]})
        run.settle()


def start(folder: Path, **settings: Any) -> OnDisk:
    return OnDisk(folder, {"a": np.zeros((5, 5), np.float32), "b": np.zeros(15, np.float32)}, **settings)


def parameters(run: OnDisk) -> Array:
    now = run.machine.parameters
    return np.concatenate([np.asarray(now["a"]).reshape(-1), now["b"]])


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("before", ["", "nnm", "bucketing:2"])
def test_a_round_is_moved_by_what_the_rule_gives(tmp_path: Path, name: str, before: str) -> None:
    settings = RuleSettings(byzantine=1, clip_radius=5.0, clip_iterations=2)
    rule = Chain(pre_aggregations_of(before, settings), RULES[name](settings))
    run = start(
        tmp_path,
        strategy=name,
        pre_aggregation=before,
        buffer_size=10,
        clip_radius=5.0,
        clip_iterations=2,
        seed=7,
        learning_rate=0.5,
    )

    publish(run, updates(10))
    first = rule(rows_of(updates(10)), Occasion(7, 0))
    np.testing.assert_allclose(parameters(run), 0.5 * first, rtol=1e-5, atol=1e-6)
    run.restart()  # what the last round came to is part of the state
    publish(run, updates(10, seed=1))
    run.close()

    second = rule(rows_of(updates(10, seed=1)), Occasion(7, 1, first))
    np.testing.assert_allclose(parameters(run), 0.5 * (first + second), rtol=1e-5, atol=1e-6)


def test_centered_clipping_would_come_out_otherwise_without_its_memory() -> None:
    rule = RULES["centered-clipping"](RuleSettings(1, 2.0, 1))
    rows = rows_of(updates(10))

    assert not np.allclose(rule(rows, Occasion()), rule(rows, Occasion(previous=np.ones(SIZE, np.float32))), atol=1e-2)


@pytest.mark.parametrize("mode", ["delta", "gradient"])
def test_a_run_is_replayed_bit_for_bit(tmp_path: Path, mode: str) -> None:
    settings = {"strategy": "centered-clipping", "pre_aggregation": "bucketing:2", "buffer_size": 8, "momentum": 0.5}
    run = start(tmp_path, mode=mode, **settings)
    for seed in range(3):
        publish(run, updates(8, seed))
        run.restart(**({"strategy": "trimmed-mean"} if seed == 1 else {}))
    publish(run, updates(8, 9)[:3])  # a round that is not closed
    run.close()
    assert run.version == 3

    lineage = Lineage(run.folder, run.store)
    lineage.refresh(run.store.head())
    replay = Replay(lineage, run.store)
    replay.plan(3)

    assert list(replay.run()) == [1, 2, 3]
    assert replay.original.digest == run.store.load().digest


def test_a_stopped_runs_last_round_may_have_fewer_updates_than_the_rule_needs(tmp_path: Path) -> None:
    run = start(tmp_path, strategy="krum", buffer_size=5)
    publish(run, updates(2))

    run.order(stop_after_rounds=1, buffer_size=5)
    run.close()

    assert run.version == 0
    rule = RULES["krum"](RuleSettings(1))
    assert np.array_equal(rule(rows_of(updates(2)), Occasion()), updates(2)[0])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"strategy": "krum", "byzantine": 2, "buffer_size": 6},
            r"byzantine = 2, .*'krum'.*below 7 updates: raise buffer",
        ),
        ({"strategy": "trimmed-mean", "byzantine": 5}, "below 11 updates"),
        ({"strategy": "median", "byzantine": 5}, "below 11 updates"),
        (
            {"strategy": "multi-krum", "pre_aggregation": "bucketing:3", "byzantine": 2},
            "pre_aggregation = 'bucketing:3', .* below 19 updates",
        ),
        ({"strategy": "krum", "rounds": "synchronous", "minimum_updates": 4}, "below 5 .*raise minimum_updates"),
        ({"strategy": "median", "pre_aggregation": "bucket:2"}, "no pre-aggregation is called 'bucket:2'"),
        ({"pre_aggregation": "nnm"}, "strategy = 'mean' is none"),
        ({"strategy": "median", "weighting": "examples"}, "lie about"),
        ({"strategy": "median", "mode": "parameters", "buffer_size": 5}, "takes steps"),
        ({"strategy": "krumm"}, "krum"),
    ],
)
def test_what_cannot_withstand_what_it_is_to_withstand_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(**settings)


def test_a_line_of_the_history_says_what_made_its_version() -> None:
    told = config(strategy="krum", byzantine=2, pre_aggregation="nnm").rules().settings

    assert (told["strategy"], told["byzantine"], told["pre_aggregation"]) == ("krum", 2, "nnm")
    assert not {"byzantine", "pre_aggregation", "clip_radius", "clip_iterations"} & config().rules().settings.keys()


def driver_of(strategy: str) -> Driver:
    rules = config(strategy=strategy, buffer_size=5, quarantine_score=1.0).rules()
    return Driver(rules, snapshot_of({"w": vector(*np.zeros(SIZE))}))


def turn(driver: Driver, version: int) -> None:
    """A round of four that agree, more or less, and one that pulls the other way."""
    for number, row in enumerate(updates(5, version)):
        values = -4 * row if number == 4 else row
        driver.update(update_of({"w": values}, worker=f"w{number}", seq=version, base_version=version))


def test_who_pulls_against_what_a_robust_rule_gives_ends_in_quarantine() -> None:
    driver = driver_of("median")
    for version in range(3):
        turn(driver, version)

    kept_out = [fact.worker for fact in driver.facts if isinstance(fact, do.Quarantined)]
    assert kept_out == ["w4"]
    assert driver.machine.screening.standings.score("w0", driver.machine.version) == 0.0


def test_where_a_mean_was_drawn_by_the_bad_ones_nobody_is_blamed() -> None:
    driver = driver_of("mean")
    for version in range(5):
        turn(driver, version)

    assert driver.machine.version == 5
    assert not driver.disk.standings
