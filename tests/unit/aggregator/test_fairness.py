"""No worker decides alone: shares of a buffer, and weights by the inverse of the workers' rates."""

from __future__ import annotations

import itertools
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from aggregator.config import AggregatorConfig
from aggregator.core import effects as do
from aggregator.core.fairness import MOST, Fairness, Rates
from aggregator.core.rounds import Buffered
from aggregator.lineage import Replay
from aggregator.rollback import open_lineage
from aggregator.strategies.base import scaled
from broker.errors import ConfigError
from broker.messages import Mode, Plan, Reason
from tests.support.builders import snapshot_of, update_of, vector
from tests.support.ondisk import OnDisk
from tests.unit.aggregator.driver import Driver


def factors(workers: str, window: int = 100, limit: float = MOST) -> list[float]:
    rates = Rates()
    return [take(rates, worker, Fairness(window, limit)) for worker in workers]


def take(rates: Rates, worker: str, fairness: Fairness) -> float:
    factor = rates.factor(worker, fairness)
    assert rates.factor(worker, fairness) == factor, "to ask changes nothing"
    rates.add(worker, fairness)
    return factor


# -------------------------------------------------------------------------------------------------- by their rates


def test_factors_are_equal_rates_through_those_that_are() -> None:
    # n / (m c): of three updates, two workers, two of them of a: 3 / (2 * 2), and so on.
    assert factors("aab") == pytest.approx([1, 1, 3 / 2])
    assert factors("abab") == [1, 1, 3 / 4, 1]


def test_in_the_long_run_workers_weigh_the_same_and_steps_keep_their_length() -> None:
    """One sends four times as often as another, which sends twice as often as the third."""
    period = "aaaaaaaabbc"
    last = factors(period * 40, window=4 * len(period))[-10 * len(period) :]
    by_worker: dict[str, float] = defaultdict(float)
    for worker, factor in zip(itertools.cycle(period), last, strict=False):
        by_worker[worker] += factor

    assert dict(by_worker) == pytest.approx({worker: 10 * len(period) / 3 for worker in "abc"}, rel=1e-9)


def test_no_factor_is_above_the_limit() -> None:
    assert factors("a" * 50 + "b")[-1] == MOST
    assert factors("a" * 50 + "b", limit=1.0)[-1] == 1.0


def test_the_window_forgets() -> None:
    rates = Rates()
    for worker in "aaaab":
        take(rates, worker, Fairness(window=2))

    assert rates.to_plain() == ("a", "b")
    assert take(Rates(rates.to_plain()), "b", Fairness(window=2)) == 1.0
    assert take(rates, "b", Fairness()) == 1.0
    assert rates.to_plain() == ()


def test_updates_are_weighed_by_rate_and_the_history_tells() -> None:
    config = AggregatorConfig(buffer_size=3, fairness="inverse-rate")
    driver = Driver(config.rules(), snapshot_of({"w": vector(0)}))
    for seq, (worker, value) in enumerate([("a", 1), ("a", 1), ("b", 4)]):
        driver.update(update_of({"w": vector(value)}, worker=worker, seq=seq))

    assert float(driver.parameters["w"][0]) == pytest.approx((1 + 1 + 1.5 * 4) / 3)
    assert [(entry.factor, entry.weight) for entry in driver.records[0].updates] == [(1, 1), (1, 1), (1.5, 1.5)]


def test_rates_survive_a_restart_in_mid_round_and_are_replayed(tmp_path: Path) -> None:
    """The same updates with and without restarts make the same bits, and a replay makes them, too."""
    digests = []
    for restarts in (False, True):
        folder = tmp_path / str(restarts)
        run = OnDisk(
            folder, {"w": vector(0.1, 0.2)}, buffer_size=3, fairness="inverse-rate", fairness_window=5, commit_count=1
        )
        for seq, worker in enumerate("aababcaaacb"):
            run.publish(worker, run.random(seq))
            run.settle()
            if restarts and seq % 2:
                run.restart()
        digests.append(run.store.load().digest)
        replay = Replay(open_lineage(folder, run.store), run.store, frozenset())
        replay.plan(3)
        assert len(list(replay.run())) == 3
        assert any(update.get("factor") for line in run.lines() for update in line["updates"])
        run.close()

    assert digests[0] == digests[1]


def test_parameters_are_not_overshot() -> None:
    rules = AggregatorConfig(mode=Mode.PARAMETERS, buffer_size=1, fairness="inverse-rate").rules()
    assert rules.fairness.limit == 1.0


def test_a_strategy_that_cannot_weigh_is_told() -> None:
    class Plain:
        init = fold = finish = None

    with pytest.raises(ConfigError, match="cannot weigh updates by their workers' rates"):
        scaled(Plain(), 0.5)  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------------ by share


def shared(**settings: Any) -> Driver:
    config = AggregatorConfig(buffer_size=4, worker_share=0.5, **settings)
    driver = Driver(config.rules(), snapshot_of({"w": vector(0)}))
    driver.hello("a", "b")
    return driver


def send(driver: Driver, worker: str, *seqs: int) -> None:
    for seq in seqs:
        driver.update(update_of({"w": vector(1)}, worker=worker, seq=seq, base_version=driver.machine.version))


def test_a_workers_share_of_a_buffer_is_bounded_and_it_is_told() -> None:
    driver = shared()

    assert driver.broadcasts[0].plan.updates_per_version == 2
    send(driver, "a", 0, 1, 2)
    assert driver.reasons == [Reason.WORKER_SHARE]
    assert driver.told[0].worker == "a"
    assert driver.told[0].detail == "2 of 4 updates in the buffer are a's; aggregator.worker_share allows no more"
    send(driver, "b", 0, 1)
    assert driver.machine.version == 1
    send(driver, "a", 3)
    assert driver.machine.fill == 1, "in the next buffer it has its share again"


@pytest.mark.parametrize(("share", "wanted"), [(None, 100), (2, 2)])
def test_a_worker_may_send_more_than_a_buffer_ahead_unless_its_share_is_limited(share: int | None, wanted: int) -> None:
    rule = Buffered(size=4, max_staleness=5, updates_per_version=100, most_per_worker=share)

    assert rule.plan(Plan()).updates_per_version == wanted


def test_who_has_used_up_its_share_is_not_asked_again() -> None:
    driver = shared()
    send(driver, "a", 0, 1, 2)

    for _ in range(30):
        driver.tick(1.0)

    assert not any(isinstance(fact, do.Warn) for fact in driver.facts)
    assert len(driver.broadcasts) == 1


def test_whose_update_was_bad_is_asked_again_even_with_a_share() -> None:
    driver = shared()
    driver.update(update_of({"w": vector(float("nan"))}, worker="b"))
    for _ in range(6):
        driver.tick(1.0)
        driver.hello("a", "b")

    assert driver.broadcasts[-1].plan.asked == 1


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"worker_share": 0.2, "buffer_size": 4}, "is less than one update"),
        ({"fairness": "inverse-rate", "rounds": "synchronous"}, "fairness is for buffered rounds"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AggregatorConfig(**settings)


def test_a_command_can_set_a_share_whatever_the_buffer() -> None:
    AggregatorConfig.check("worker_share", 0.01)
    assert AggregatorConfig(buffer_size=100, worker_share=0.29).rules().rounds.most_per_worker == 29  # type: ignore[attr-defined]
    assert AggregatorConfig(buffer_size=10, worker_share=0.35).rules().rounds.most_per_worker == 3  # type: ignore[attr-defined]
