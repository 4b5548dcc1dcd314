"""Learning rates over a run, against torch's, and through restarts, commands and replays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.optim import lr_scheduler

from aggregator.config import AggregatorConfig
from aggregator.lineage import Replay
from aggregator.rollback import open_lineage
from aggregator.schedules import Schedule, constant, cosine, factor_at, schedule_of, step, warmed_up
from broker.errors import ConfigError, StrategyError
from tests.support.builders import vector
from tests.support.ondisk import OnDisk


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (constant, lambda o: lr_scheduler.ConstantLR(o, factor=1.0)),
        (step(3, 0.5), lambda o: lr_scheduler.StepLR(o, 3, gamma=0.5)),
        (cosine(20, 0.1), lambda o: lr_scheduler.CosineAnnealingLR(o, 20, eta_min=0.1)),
        (
            warmed_up(cosine(15, 0.0), 5),
            lambda o: lr_scheduler.SequentialLR(
                o,
                [lr_scheduler.LinearLR(o, 1 / 5, total_iters=4), lr_scheduler.CosineAnnealingLR(o, 15)],
                milestones=[5],
            ),
        ),
        (
            warmed_up(step(4, 0.1), 3),
            lambda o: lr_scheduler.SequentialLR(
                o, [lr_scheduler.LinearLR(o, 1 / 3, total_iters=2), lr_scheduler.StepLR(o, 4)], milestones=[3]
            ),
        ),
    ],
    ids=["constant", "step", "cosine", "warm-up and cosine", "warm-up and step"],
)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step:UserWarning", "ignore:The epoch parameter:UserWarning")
def test_they_are_torchs(ours: Schedule, theirs: Callable[[Any], Any]) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = theirs(optimizer)

    for version in range(20):
        assert ours(version) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), version
        optimizer.step()
        scheduler.step()


def test_a_cosine_stays_at_its_floor() -> None:
    assert [cosine(4, 0.25)(version) for version in (0, 2, 4, 5, 10**12)] == [1.0, 0.625, 0.25, 0.25, 0.25]


def schedule(**settings: Any) -> Schedule:
    return schedule_of(AggregatorConfig(**settings).recipe())


def test_settings_reach_them() -> None:
    assert schedule()(10**12) == 1.0
    assert [schedule(schedule="step", schedule_rounds=2, schedule_decay=0.5)(v) for v in range(5)] == [
        1,
        1,
        0.5,
        0.5,
        0.25,
    ]
    # The warm-up is a part of the cosine's length, which is the run's unless it is set.
    warm = schedule(schedule="cosine", stop_after_rounds=6, warmup_rounds=2)
    assert [warm(v) for v in (0, 1, 2, 4, 6)] == [0.5, 1, 1, 0.5, 0]
    assert schedule(schedule="cosine", stop_after_rounds=6, schedule_rounds=4, schedule_floor=0.5)(5) == 0.5


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"schedule": "cosine"}, "needs schedule_rounds or stop_after_rounds"),
        ({"schedule": "step", "stop_after_rounds": 5}, "needs schedule_rounds .type"),
        (
            {"schedule": "cosine", "schedule_rounds": 5, "warmup_rounds": 5},
            "ends at version 5, which is within the warm",
        ),
        ({"schedule": "cosin", "schedule_rounds": 5}, "did you mean 'cosine'"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        AggregatorConfig(**settings)


def test_a_command_can_name_a_schedule_before_its_length() -> None:
    AggregatorConfig.check("schedule", "cosine")
    with pytest.raises(ConfigError, match="needs schedule_rounds"):
        AggregatorConfig().changed({"schedule": "cosine"})


@pytest.mark.parametrize("factor", [-0.1, float("nan"), float("inf")])
def test_a_factor_that_is_none_is_told(factor: float) -> None:
    with pytest.raises(StrategyError, match="schedule gave"):
        factor_at(lambda _: factor, 3)


def test_a_schedule_goes_on_through_restarts_and_commands_and_is_replayed(tmp_path: Path) -> None:
    """Each version moves by the rate that was set last, times the factor; a replay makes the same bits."""
    run = OnDisk(
        tmp_path,
        {"w": vector(0)},
        buffer_size=1,
        schedule="step",
        schedule_rounds=2,
        schedule_decay=0.5,
        warmup_rounds=1,
    )
    values = [0.0]

    def move(times: int) -> None:
        for _ in range(times):
            run.publish("a", {"w": vector(1)})
            run.settle()
            values.append(float(run.machine.parameters["w"][0]))

    move(2)
    run.restart()
    move(2)
    run.order(learning_rate=10.0)
    move(1)
    run.restart()
    move(1)
    run.order(schedule="constant")
    move(1)

    assert np.diff(values).tolist() == [1, 1, 1, 0.5, 5, 2.5, 10]
    assert [line["settings"].get("schedule") for line in run.lines()] == ["step"] * 6 + [None]
    replay = Replay(open_lineage(tmp_path, run.store), run.store, frozenset())
    replay.plan(7)
    assert len(list(replay.run())) == 7
    run.close()
