"""A federation in virtual time: what must be the same, and what must not be lost."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.core.effects import Broadcast
from broker.errors import ConfigError, StrategyError
from fedmq.simulation.quadratic import Quadratic
from fedmq.simulation.record import Result
from fedmq.simulation.run import objective_of, simulate
from fedmq.simulation.world import World
from tests.support.scenarios import scenario_of


def run(folder: Path, **changes: Any) -> Result:
    return simulate(scenario_of(folder, {key.replace("__", "."): value for key, value in changes.items()}))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"population__jitter": 0.3, "objective__noise": 0.1, "network__loss": 0.2}

    first, again = run(tmp_path, **changes), run(tmp_path, **changes)
    other = run(tmp_path, **changes, run__seed=1)

    assert first.plain() == again.plain()
    assert first.digest != other.digest


def test_a_run_does_not_touch_the_global_random_state(tmp_path: Path) -> None:
    before = np.random.get_state()[1].tolist()  # type: ignore[index] # noqa: NPY002

    run(tmp_path, population__jitter=0.3)

    assert np.random.get_state()[1].tolist() == before  # type: ignore[index] # noqa: NPY002


def test_updates_as_bytes_and_updates_as_they_are_give_the_same(tmp_path: Path) -> None:
    with_wire, direct = run(tmp_path, run__wire=True), run(tmp_path, run__wire=False)

    assert with_wire.digest == direct.digest
    assert with_wire.bytes_up > direct.bytes_up  # headers


def test_it_learns(tmp_path: Path) -> None:
    result = run(tmp_path, run__updates=2000, population__speed="constant")

    assert result.points[-1].metrics["gap"] < 1e-3 < result.points[0].metrics["gap"]


def test_nothing_takes_longer_with_more_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of all workers, made at each event, would make a million of them impossible; one a commit is none."""
    lists = 0

    def counted(names: Iterable[str]) -> list[str]:
        nonlocal lists
        lists += 1
        return sorted(names)

    monkeypatch.setattr("aggregator.core.roster.sorted", counted, raising=False)
    result = run(tmp_path, population__workers=500, run__updates=1000, aggregator__buffer_size=100)

    assert result.updates == 1000
    assert lists <= 4 * result.versions


def test_what_is_lost_or_repeated_on_the_way_counts_once(tmp_path: Path) -> None:
    result = run(tmp_path, network__loss=0.3, network__duplicates=0.3, network__latency=0.05)

    assert result.updates == 200
    assert result.repeated > 0
    assert result.deliveries >= result.updates + result.repeated


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 0.4])
def test_a_crash_of_the_aggregator_loses_nothing_and_repeats_nothing(tmp_path: Path, checkpoint_seconds: float) -> None:
    """Whoever publishes is confirmed at once; so all that was published counts, or waits."""
    scenario = scenario_of(
        tmp_path,
        {
            "faults.crash_every": 1.5,
            "faults.downtime": 0.3,
            "faults.checkpoint_seconds": checkpoint_seconds,
            "aggregator.max_staleness": 10_000,
            "run.updates": 400,
        },
    )
    world = World(scenario, objective_of(scenario))

    result = world.run()

    assert result.crashes > 3
    assert not result.rejected
    applied = sorted(world.aggregator.ledger)
    assert len(applied) == len(set(applied)) == result.updates
    published = {(name, seq) for name, count in world.author.published() for seq in range(count)}
    waiting = world.aggregator.waiting_ids()
    assert {(one.worker, one.seq) for one in applied} | {(one.worker, one.seq) for one in waiting} == published


def test_a_crash_at_a_quiet_moment_changes_no_parameter(tmp_path: Path) -> None:
    """All is durable between two rounds, so the next aggregator goes on as the one before would have."""
    quiet = {"population__speed": "constant", "run__updates": 240, "aggregator__buffer_size": 12}

    undisturbed = run(tmp_path, **quiet)
    crashed = run(tmp_path, **quiet, faults__crash_times=[4.5, 9.5], faults__downtime=0.2)

    assert (undisturbed.crashes, crashed.crashes) == (0, 2)
    assert crashed.digest == undisturbed.digest


@pytest.mark.parametrize("strategy", ["mean", "fednova", "median"])
def test_a_crash_in_mid_round_goes_on_with_what_was_folded(tmp_path: Path, strategy: str) -> None:
    quiet = {"population__speed": "constant", "run__updates": 240, "aggregator__buffer_size": 24}
    same = {**quiet, "aggregator__strategy": strategy, "aggregator__commit_count": 1}

    undisturbed = run(tmp_path, **same)
    crashed = run(tmp_path, **same, faults__crash_times=[5.5, 9.5], faults__downtime=0.2)

    assert crashed.crashes == 2
    assert crashed.digest == undisturbed.digest


def test_a_buffer_as_large_as_the_cohort_is_federated_averaging_bit_for_bit(tmp_path: Path) -> None:
    same: dict[str, Any] = {"population__speed": "constant", "run__updates": None, "run__versions": 20}

    synchronous = run(tmp_path, **same, aggregator__rounds="synchronous")
    buffered = run(
        tmp_path,
        **same,
        aggregator__buffer_size=12,
        aggregator__updates_per_version=1,
        aggregator__weighting="examples",
    )

    assert synchronous.digest == buffered.digest
    assert synchronous.updates == buffered.updates == 240


def test_synchronous_rounds_wait_for_the_slowest_and_buffered_ones_do_not(tmp_path: Path) -> None:
    times = {
        rounds: run(tmp_path, aggregator__rounds=rounds, population__spread=1.5).seconds
        for rounds in ("synchronous", "buffered")
    }

    assert times["buffered"] < times["synchronous"] / 2


def test_workers_that_come_and_go_and_disappear_do_not_stop_it(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "population__availability": "on-off",
        "population__on_seconds": 5.0,
        "population__off_seconds": 5.0,
        "population__dropout": 0.01,
        "aggregator__rounds": "synchronous",
    }

    result = run(tmp_path, **changes)

    assert result.ended == "updates"
    assert result.left > 0


def test_days_repeat(tmp_path: Path) -> None:
    result = run(tmp_path, population__availability="diurnal", population__day_seconds=10.0, population__on_share=0.3)

    assert result.ended == "updates"
    assert result.seconds > run(tmp_path).seconds


@pytest.mark.parametrize("checkpoint_seconds", [0.0, 0.5, 3.0])
def test_a_point_is_of_the_version_that_it_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, checkpoint_seconds: float
) -> None:
    """While the disk is slow the machine is versions ahead of what is durable, and several become so at once."""
    losses = {}

    def broadcast(world: World, effect: Broadcast) -> None:
        losses[effect.version] = world.objective.score(effect.parameters)
        told(world, effect)

    told = World.broadcast
    monkeypatch.setattr(World, "broadcast", broadcast)
    result = run(tmp_path, faults__checkpoint_seconds=checkpoint_seconds, run__evaluate_every=2)

    *points, last = result.points
    assert len(points) >= 4
    assert all(point.metrics == losses[point.version] for point in points)
    assert [point.version // 2 for point in points] == sorted({point.version // 2 for point in points})
    assert last.version == result.versions


def test_what_is_better_must_be_said_of_a_metric_that_nobody_knows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Quadratic, "score", lambda _, tensors: {"score": 1.0 - float(np.abs(tensors["x"]).max())})
    odd = {"run__metric": "score", "run__target": -5.0}

    up, down = (run(tmp_path, **odd, run__goal=goal) for goal in ("at-least", "at-most"))

    assert up.reached is not None
    assert up.reached.metrics["score"] >= -5.0 > up.points[0].metrics["score"]
    assert down.reached is down.points[0]
    with pytest.raises(ConfigError, match="is more of 'score' better"):
        run(tmp_path, **odd)


def test_a_training_that_diverges_ends_the_scenario_soon(tmp_path: Path) -> None:
    hopeless = {"attack__kind": "gaussian:1e38", "attack__share": 1.0}

    with pytest.raises(ConfigError, match=r"none of the last 221 updates was taken, the last one as not-finite: train"):
        run(tmp_path, **hopeless)


def test_it_ends_at_the_target(tmp_path: Path) -> None:
    result = run(tmp_path, run__metric="gap", run__target=0.5, run__updates=100_000)

    assert result.ended == "target"
    assert result.reached is result.points[-1]
    assert result.points[-1].metrics["gap"] <= 0.5 < result.points[-2].metrics["gap"]


def test_everybody_gone_is_a_standstill_and_says_so(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"standstill at .* s: version 0 has \d+ updates .* 0 of 12 workers"):
        run(tmp_path, population__dropout=0.9, aggregator__buffer_size=50)


def test_a_metric_that_is_not_measured_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.metric = 'accuracy' is not measured here; there are gap, loss"):
        run(tmp_path, run__metric="accuracy")


def test_a_deadline_that_nobody_can_meet_is_refused(tmp_path: Path) -> None:
    late = {"population__speed": "constant", "population__seconds": 3.0, "network__latency": 0.5}

    with pytest.raises(ConfigError, match=r"deadline = 3\.9, but the fastest worker takes 4 s to answer"):
        run(tmp_path, **late, aggregator__rounds="synchronous", aggregator__deadline=3.9)
    assert run(tmp_path, **late, aggregator__rounds="synchronous", aggregator__deadline=4.1).ended == "updates"


def test_a_scenario_can_end_while_the_aggregator_is_down(tmp_path: Path) -> None:
    result = run(tmp_path, run__updates=None, run__seconds=5.0, faults__crash_times=[4.0], faults__downtime=10.0)

    assert (result.ended, result.seconds, result.crashes) == ("seconds", 5.0, 1)


def test_a_strategy_whose_aggregate_is_not_finite_makes_no_version_and_is_named(tmp_path: Path) -> None:
    name = "tests.support.strategies:Nan.of"
    complaint = f"strategy {name}: x is not finite after the step"
    changes: dict[str, Any] = {"aggregator.strategy": name, "run.updates": None, "run.versions": 2}

    result = simulate(scenario_of(tmp_path, changes))

    assert all(complaint in text for text in result.warnings)
    assert sum(result.warnings.values()) == 2
    assert result.points[-1].metrics == result.points[0].metrics
    with pytest.raises(StrategyError, match=re.escape(complaint)):
        run(tmp_path, aggregator__strategy=name)


@pytest.mark.parametrize("strategy", ["Reshaped", "Absent"])
def test_a_strategy_that_gives_other_tensors_ends_the_run_and_is_named(tmp_path: Path, strategy: str) -> None:
    with pytest.raises(StrategyError, match=rf"tests\.support\.strategies\.{strategy} gave other tensors .*: x"):
        run(tmp_path, aggregator__strategy=f"tests.support.strategies:{strategy}.of")
