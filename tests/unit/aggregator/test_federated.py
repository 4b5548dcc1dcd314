"""Workers' figures put together: by examples, each worker once, with the spread; and when a stretch is closed."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from aggregator.config import AggregatorConfig
from aggregator.core import events as on
from aggregator.core.federated import Checks, Federated
from aggregator.history import History, read_history
from aggregator.reading import from_aside
from broker.messages import Event, EventKind, Role, Work
from broker.transport import Delivery, Source
from broker.wire import encode
from fedmq.historydisplay import _event
from tests.support.builders import RUN, snapshot_of, update_of, vector
from tests.unit.aggregator.driver import Driver


def test_the_mean_is_by_examples_and_the_spread_by_workers() -> None:
    checks = Checks()
    checks.add("a", 4, 10, {"loss": 1.0}, 4)
    checks.add("b", 5, 30, {"loss": 3.0, "accuracy": 0.5}, 4)
    checks.add("c", 4, 60, {"loss": math.nan, "accuracy": 1.0}, 4)

    [figures] = checks.end()

    assert (figures.version, figures.versions, figures.workers, figures.examples) == (4, (4, 5), 3, 100)
    loss, accuracy = figures.metrics["loss"], figures.metrics["accuracy"]
    assert (loss.mean, loss.minimum, loss.median, loss.maximum, loss.std) == (2.5, 1.0, 2.0, 3.0, 1.0)
    assert accuracy.mean == pytest.approx((30 * 0.5 + 60) / 90)


def test_a_worker_counts_once_with_its_newest_figures() -> None:
    checks = Checks()
    for version, loss in ((0, 9.0), (1, 5.0)):
        checks.add("a", version, 10, {"loss": loss}, 10)
    checks.add("b", 0, 10, {"loss": 1.0}, 10)

    [figures] = checks.end()

    assert (figures.workers, figures.metrics["loss"].mean) == (2, 3.0)


def test_a_stretch_is_closed_when_all_who_are_here_are_through_with_it() -> None:
    checks = Checks()
    checks.add("a", 0, 1, {"loss": 1.0}, 2)
    assert checks.close(1, ("a", "b"), 2) == []
    checks.add("b", 3, 1, {"loss": 2.0}, 2)
    assert [one.version for one in checks.close(3, ("a", "b"), 2)] == [0]
    # What comes now for it is too late.
    checks.add("c", 1, 1, {"loss": 9.0}, 2)
    assert [(one.version, one.workers) for one in checks.end()] == [(2, 1)]
    assert checks.end() == []


def test_a_stretch_stays_open_for_those_who_have_not_come_yet() -> None:
    checks = Checks()
    checks.add("a", 0, 1, {"loss": 1.0}, 1)
    assert checks.close(0, ("a",), 1) == []
    checks.add("b", 0, 1, {"loss": 2.0}, 1)
    assert [one.workers for one in checks.close(1, ("a", "b"), 1)] == [2]


def test_a_stretch_is_closed_when_it_is_old() -> None:
    checks = Checks()
    checks.add("a", 0, 1, {"loss": 1.0}, 10)
    assert checks.close(19, ("a", "silent"), 10) == []
    assert [one.version for one in checks.close(20, ("a", "silent"), 10)] == [0]


def driver_of(**settings: int) -> Driver:
    config = AggregatorConfig.model_validate({"buffer_size": 1, "linger": 100.0, **settings})
    return Driver(config.rules(), snapshot_of({"w": vector(1.0)}))


def figures_of(driver: Driver) -> list[Federated]:
    return [fact for fact in driver.facts if isinstance(fact, Federated)]


def test_the_machine_tells_them_and_updates_do_not_count() -> None:
    driver = driver_of(evaluate_every=2)
    driver.hello("a", "b")
    driver.send(on.Checked("a", 0, 10, {"loss": 4.0}))
    for seq in range(3):
        driver.update(update_of({"w": vector(0.1)}, worker="a", seq=seq, base_version=seq))
    assert not figures_of(driver)

    driver.send(on.Checked("b", 1, 30, {"loss": 8.0}))

    [figures] = figures_of(driver)
    assert (figures.version, figures.workers, figures.metrics["loss"].mean) == (0, 2, 7.0)
    assert driver.broadcasts[-1].plan.work == Work(evaluate_every=2)


def test_a_run_that_is_done_waits_a_little_for_figures_that_are_beside_the_goodbye() -> None:
    driver = driver_of(evaluate_every=1, stop_after_rounds=1)
    driver.hello("a")
    driver.send(on.Checked("a", 0, 10, {"loss": 4.0}))
    driver.update(update_of({"w": vector(0.1)}, worker="a"))
    driver.goodbye("a", confirmed=1)
    assert driver.endings == []

    driver.send(on.Checked("a", 1, 10, {"loss": 3.0}))

    assert driver.endings == ["done"]
    assert [one.version for one in figures_of(driver)] == [0, 1]


def test_it_does_not_wait_for_ever_for_figures() -> None:
    driver = driver_of(evaluate_every=1, stop_after_rounds=1)
    driver.hello("a")
    driver.send(on.Checked("a", 0, 10, {"loss": 4.0}))
    driver.update(update_of({"w": vector(0.1)}, worker="a"))
    driver.goodbye("a", confirmed=1)
    assert driver.wake_at == driver.now + 2.0

    driver.tick(2.0)

    assert driver.endings == ["done"]


def event(**data: float | str) -> Delivery:
    message = Event(run=RUN, kind=EventKind.CHECK, source="a", time=0.0, data={"role": str(Role.TRAINER), **data})
    return Delivery(source=Source.EVENT, body=encode(message), token=None)


def test_events_of_workers_figures_are_read_and_nonsense_is_not() -> None:
    happening = from_aside(event(version=3, examples=7, loss=0.5), RUN, 3)
    assert happening == on.Checked("a", 3, 7, {"loss": 0.5})
    for facts in ({"version": 4, "examples": 7}, {"version": -1, "examples": 7}, {"version": 3, "examples": 0}):
        assert from_aside(event(**facts), RUN, 3) is None
    assert from_aside(event(version="3", examples=7), RUN, 3) is None
    assert from_aside(event(version=3), RUN, 3) is None


def test_the_history_has_them_and_shows_them(tmp_path: Path) -> None:
    checks = Checks()
    checks.add("a", 4, 10, {"loss": 1.0}, 4)
    checks.add("b", 4, 30, {"loss": 3.0}, 4)
    history = History(tmp_path / "history.jsonl")
    history.federated(checks.end()[0], 1.0)

    [line] = [line for line in read_history(history.file) if line["kind"] == "federated"]

    assert line["metrics"]["loss"] == {"mean": 2.5, "min": 1.0, "median": 2.0, "max": 3.0, "std": 1.0}
    assert _event(line) == "2 workers on their own data: loss 2.5 (1 to 3)"


def test_personalisation_is_part_of_evaluation() -> None:
    with pytest.raises(ValueError, match="evaluate_every"):
        AggregatorConfig(personalise_steps=3)
