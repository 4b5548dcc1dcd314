"""FedNova by its formula, in the round machine, in checkpoints, and on objectives where FedAvg goes elsewhere."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core.rounds import Buffered, Synchronous
from aggregator.history import version_line, version_record
from aggregator.replay import Link, Rebuild
from aggregator.staleness import constant, polynomial
from aggregator.strategies import FedNova, Mean, Strategy
from broker.errors import ConfigError
from broker.messages import Array, Reason, Update, Work
from tests.support.builders import rules_of, snapshot_of, update_of, vector
from tests.unit.aggregator.driver import Driver

START = {"w": vector(1.0, -2.0, 0.5), "mean": vector(4.0), "seen": np.array(5)}
BUFFERS = ("mean", "seen")


def update(values: Array, effort: float, **facts: int | str) -> Update:
    tensors = {"w": values.astype(np.float32), "mean": vector(8.0), "seen": np.array(2)}
    made = update_of(tensors, buffers=BUFFERS, **facts)  # type: ignore[arg-type]
    return replace(made, steps=int(effort), effort=effort)


def after_one_round(strategy: Strategy, updates: list[Update], bases: list[int] | None = None) -> dict[str, Array]:
    rounds = Buffered(size=len(updates), max_staleness=10)
    driver = Driver(rules_of(rounds=rounds, strategy=strategy), snapshot_of(START, buffers=BUFFERS))
    for one in updates:
        driver.update(one)
    assert driver.machine.version == 1
    return dict(driver.parameters)


efforts = st.lists(st.floats(1, 1000), min_size=1, max_size=6)


@given(efforts=efforts, seed=st.integers(0, 2**32 - 1), by_examples=st.booleans())
def test_it_is_the_papers_formula(efforts: list[float], seed: int, by_examples: bool) -> None:
    """Equation 10: x - tau_eff * sum p_i eta d_i, with eta d_i = -delta_i / a_i and tau_eff = sum p_i a_i."""
    random = np.random.default_rng(seed)
    deltas = [random.normal(size=3).astype(np.float32) for _ in efforts]
    examples = [int(n) for n in random.integers(1, 100, len(efforts))]
    updates = [
        update(delta, effort, seq=i, examples=n)
        for i, (delta, effort, n) in enumerate(zip(deltas, efforts, examples, strict=True))
    ]

    result = after_one_round(FedNova("examples" if by_examples else "uniform", constant()), updates)

    p = np.array(examples if by_examples else [1] * len(efforts), np.float64)
    p /= p.sum()
    tau_eff = float(p @ efforts)
    step = tau_eff * sum(p_i * d.astype(np.float64) / a for p_i, d, a in zip(p, deltas, efforts, strict=True))
    np.testing.assert_allclose(result["w"], START["w"] + step, rtol=1e-4, atol=1e-5)
    assert float(result["mean"][0]) == 8.0
    assert int(result["seen"]) == 7


def test_with_equal_efforts_it_is_the_mean() -> None:
    updates = [update(vector(i, 1, 2 * i), 12.0, seq=i, examples=i + 1) for i in range(4)]
    results = [after_one_round(kind("examples", constant()), updates)["w"] for kind in (FedNova, Mean)]
    np.testing.assert_allclose(results[0], results[1], rtol=1e-6)


def test_a_stale_update_takes_a_shorter_step_and_its_effort_counts_in_full() -> None:
    """Round 2, K = 2, s = (1 + tau)^-0.5: mean effort (2 + 6) / 2 = 4; per step (2 / 2 + s * 12 / 6) / 2."""
    driver = Driver(
        rules_of(rounds=Buffered(size=2, max_staleness=9), strategy=FedNova("uniform", polynomial(0.5))),
        snapshot_of({"w": vector(0.0, dtype=np.float64)}),
    )

    def send(value: float, effort: float, seq: int, base: int) -> None:
        one = update_of({"w": vector(value, dtype=np.float64)}, seq=seq, base_version=base)
        driver.update(replace(one, effort=effort))

    send(0.0, 1.0, 0, 0)
    send(0.0, 1.0, 1, 0)
    send(2.0, 2.0, 2, 1)
    send(12.0, 6.0, 3, 0)

    assert driver.parameters["w"][0] == pytest.approx(4 * (1 + 2 * 2**-0.5) / 2, rel=1e-12)
    assert driver.records[1].updates[1].weight == pytest.approx(2**-0.5)


def test_an_update_that_does_not_say_its_effort_is_rejected_with_the_reason() -> None:
    driver = Driver(rules_of(strategy=FedNova("uniform", constant())), snapshot_of({"w": vector(1.0)}))

    for seq, effort in enumerate([0.0, 0.5]):
        driver.update(replace(update_of({"w": vector(1.0)}, seq=seq), effort=effort))
        assert driver.reasons[seq:] == [Reason.NOT_SUPPORTED]
        assert "number of local steps" in driver.told[-1].detail

    plain = Driver(rules_of(), snapshot_of({"w": vector(1.0)}))
    plain.update(update_of({"w": vector(1.0)}))
    assert not plain.rejected


def test_a_partial_round_survives_in_a_checkpoint(tmp_path: Path) -> None:
    """And is rebuilt by replay."""
    rules = AggregatorConfig(strategy="fednova", buffer_size=2, staleness="constant").rules()
    store = CheckpointStore(tmp_path, "test")
    snapshot = snapshot_of({"w": vector(1.0)}, epoch=0)
    store.create(snapshot.model, snapshot.parameters, now=0.0)
    driver = Driver(rules, store.claim())
    first = replace(update_of({"w": vector(3.0)}, seq=0), steps=4, effort=4.0)
    second = replace(update_of({"w": vector(1.0)}, seq=1), steps=2, effort=2.0)
    driver.update(first)
    store.write(driver.machine.snapshot(0.0))

    back = store.load()
    assert (back.accumulator.effort, back.entries[0].steps) == (4.0, 4)
    again = Driver(rules, back)
    again.update(second)

    per_step = (3 / 4 + 1 / 2) / 2
    assert again.parameters["w"][0] == pytest.approx(1 + 3 * per_step)
    base = snapshot_of({"w": vector(1.0)})
    rebuild = Rebuild(base)
    rebuild.open(Link(again.records[0]))
    for index, one in enumerate((first, second)):
        rebuild.fold(index, one)
    rebuild.close()
    assert rebuild.parameters["w"].tobytes() == again.parameters["w"].tobytes()


def test_with_unequal_local_steps_it_comes_to_the_optimum_where_fedavg_does_not() -> None:
    """f_i = |x - c_i|^2 / 2, worker 0 makes 1 step a round and worker 1 makes 9: FedAvg goes to worker 1's side."""
    centres, steps, rate = np.array([[0.0], [10.0]]), [1, 9], 0.02

    def final(strategy: Strategy) -> float:
        driver = Driver(
            rules_of(rounds=Synchronous(minimum=2), strategy=strategy),
            snapshot_of({"w": vector(3.0, dtype=np.float64)}),
        )
        driver.hello("w0", "w1")
        for version in range(300):
            start = driver.parameters["w"]
            for i, (centre, tau) in enumerate(zip(centres, steps, strict=True)):
                x = start.copy()
                for _ in range(tau):
                    x = x - rate * (x - centre)
                one = update_of({"w": x - start}, worker=f"w{i}", seq=version, base_version=version)
                driver.update(replace(one, steps=tau, effort=float(tau)))
        return float(driver.parameters["w"][0])

    assert abs(final(FedNova("uniform", constant())) - 5.0) < 0.3
    assert abs(final(Mean("uniform", constant())) - 5.0) > 3.0


@pytest.mark.parametrize(("said", "noted"), [(1.23456, 1.2346), (math.nan, 0.0), (-1.0, 0.0), (math.inf, 0.0)])
def test_steps_and_seconds_stand_in_the_history(said: float, noted: float) -> None:
    driver = Driver(AggregatorConfig(buffer_size=1).rules(), snapshot_of({"w": vector(1.0)}))

    driver.update(replace(update_of({"w": vector(1.0)}), steps=3, seconds=said))

    [entry] = driver.records[0].updates
    assert (entry.steps, entry.seconds) == (3, noted)
    line = version_line(driver.records[0])
    assert (line["updates"][0]["steps"], line["updates"][0]["seconds"]) == (3, noted)
    assert version_record(line).updates == (entry,)


def test_what_goes_by_local_steps_is_refused_for_gradients() -> None:
    for settings in ({"strategy": "fednova"}, {"proximal": 0.1}):
        with pytest.raises(ValueError, match="a gradient has none"):
            AggregatorConfig.model_validate({"mode": "gradient", **settings})
    with pytest.raises(ConfigError, match="a gradient has none"):
        AggregatorConfig.model_validate({"mode": "gradient"}).changed({"proximal": 0.5})


def test_the_settings_travel_with_the_plan_and_stand_in_the_history() -> None:
    rules = AggregatorConfig(proximal=0.25, worker_momentum=0.5, buffer_size=1).rules()
    driver = Driver(rules, snapshot_of({"w": vector(1.0)}))

    driver.update(update_of({"w": vector(1.0)}))

    assert driver.broadcasts[-1].plan.work == Work(proximal=0.25, momentum=0.5)
    settings = driver.records[0].settings
    assert (settings["proximal"], settings["worker_momentum"]) == (0.25, 0.5)
    assert "proximal" not in AggregatorConfig().rules().settings
