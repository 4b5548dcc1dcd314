"""The benchmark of robust rules still runs, and small sizes show what the large ones do."""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import robust

SMALL = robust.Setting(workers=10, bad=2, seeds=1, rounds=60, rate=0.5, momentum=0.9, alpha=10.0, batch=16)


@pytest.mark.parametrize("name", robust.RULE_NAMES)
def test_every_row_can_be_calculated(name: str) -> None:
    for attack in robust.SINGLE:
        assert np.isfinite(robust.single(name, attack, robust.Setting(workers=8, bad=1, seeds=1)))
    tiny = robust.Setting(workers=8, bad=1, seeds=1, rounds=2, rate=0.5, momentum=0.9, alpha=10.0, batch=4)
    for attack in robust.TRAINING:
        assert 0 <= robust.training(name, attack, tiny) <= 100


@pytest.mark.parametrize("attack", ["scaled-flip:10", "gaussian:30"])
def test_what_ruins_a_mean_does_not_ruin_the_screened_and_clipped(attack: str) -> None:
    assert robust.training("mean", attack, SMALL) < 50
    assert robust.training("screen bucketing:2 centered-clipping", attack, SMALL) > 75
