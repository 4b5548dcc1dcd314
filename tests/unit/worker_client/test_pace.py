"""Local steps by the worker's own pace, in virtual time."""

from __future__ import annotations

import numpy as np
import pytest

from aggregator.config import AggregatorConfig
from broker.messages import Mode, Work
from tests.unit.worker_client.models import Points, config, version_of
from worker_client.core.pace import Pace, steps_for
from worker_client.preparing import Preparation
from worker_client.training import Trainer, initial_parameters
from worker_client.variates import Variates

WORK = Work(update_seconds=10.0, steps_min=2, steps_max=500)


def live(step: float, rest: float, updates: int, *, pace: Pace | None = None, noise: float = 0.0) -> list[float]:
    """How long each update of a worker takes that needs ``step`` seconds for a local step and ``rest`` beside."""
    random = np.random.default_rng(3)
    seconds = []
    for _ in range(updates):
        steps = steps_for(WORK, pace)
        assert steps is not None
        stepping = steps * step * float(np.exp(noise * random.normal()))
        seconds.append(stepping + rest)
        pace = pace.after(steps, stepping, rest) if pace else Pace.of(steps, stepping, rest)
    return seconds


def test_the_steps_fill_the_rhythm() -> None:
    assert steps_for(WORK, Pace(0.1, 2.0)) == 80
    assert steps_for(WORK, Pace(0.3, 0.0)) == 33


def test_they_stay_within_their_bounds() -> None:
    assert steps_for(WORK, None) == 2
    assert steps_for(WORK, Pace(60.0, 0.0)) == 2
    assert steps_for(WORK, Pace(0.001, 0.0)) == 500
    assert steps_for(WORK, Pace(0.0, 0.0)) == 500
    assert steps_for(WORK, Pace(0.1, 99.0)) == 2


def test_without_a_rhythm_the_workers_settings_count() -> None:
    assert steps_for(Work(), Pace(0.1, 0.0)) is None


@pytest.mark.parametrize(("step", "rest"), [(0.02, 0.0), (0.1, 3.0), (0.5, 0.5), (2.0, 1.0)])
def test_workers_of_a_hundredfold_difference_in_speed_come_in_the_same_rhythm(step: float, rest: float) -> None:
    assert max(abs(seconds - 10.0) for seconds in live(step, rest, 6)[1:]) <= step


def test_the_number_of_updates_is_the_same_for_all_then() -> None:
    counts = []
    for step in (0.02, 0.1, 0.5, 2.0):
        ends = np.cumsum(live(step, 0.2, 200, noise=0.3))
        counts.append(int((ends < 1000.0).sum()))
    assert max(counts) - min(counts) <= 0.15 * max(counts)


def test_a_change_of_speed_is_followed_within_a_few_updates() -> None:
    seconds = live(0.4, 0.0, 8, pace=Pace(0.1, 0.0))
    assert seconds[0] == pytest.approx(40.0)
    assert all(abs(after - 10.0) < 1.0 for after in seconds[5:])


def test_an_odd_measurement_is_forgotten() -> None:
    pace = Pace(0.1, 0.0).after(10, 100.0, 0.0)
    for _ in range(8):
        pace = pace.after(10, 1.0, 0.0)
    assert pace.step == pytest.approx(0.1, rel=0.25)


def test_a_worker_measures_itself_and_makes_as_many_steps() -> None:
    task, settings = Points(), config(batch_size=5, delay=0.0)
    model, tensors = initial_parameters(task)
    trainer = Trainer(task, settings)
    prepare = Preparation(settings, "w i", trainer, Variates(None, settings, trainer.spec))
    slowly = Work(update_seconds=1e9, steps_min=3, steps_max=7)

    def made(work: Work, version: int, mode: Mode = Mode.DELTA) -> int:
        return prepare(version_of(model, tensors, version, work=work, mode=mode), 0, lambda: False).steps

    assert made(slowly, 0) == 3, "no pace is known"
    assert made(slowly, 1) == 7
    assert made(Work(update_seconds=1e-9, steps_min=2), 2) == 2
    assert made(Work(), 3) == 10, "as its own settings say"
    assert made(slowly, 4, Mode.GRADIENT) == 0


def test_the_rhythm_travels_with_the_plan() -> None:
    rules = AggregatorConfig(update_seconds=30.0, local_steps_min=5, local_steps_max=50).rules()
    assert rules.work == Work(update_seconds=30.0, steps_min=5, steps_max=50)
    assert rules.settings["update_seconds"] == 30.0
    assert AggregatorConfig().rules().work.update_seconds == 0.0


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(ValueError, match="local_steps_min is larger"):
        AggregatorConfig(local_steps_min=9, local_steps_max=8)
    with pytest.raises(ValueError, match="a gradient has none"):
        AggregatorConfig(update_seconds=1.0, mode=Mode.GRADIENT)
