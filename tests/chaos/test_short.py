"""A short run of chaos, always the same faults. ``make chaos`` is the long one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.chaos.campaign import campaign
from tests.support.node import require_rabbitmq

SEED = 20
SECONDS = 20.0


@pytest.mark.broker
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_nothing_is_lost_and_nothing_counts_twice(tmp_path: Path) -> None:
    if os.environ.get("TEST_RABBITMQ_URL"):
        pytest.skip("the broker of TEST_RABBITMQ_URL is not ours to kill")
    require_rabbitmq()

    report = campaign(tmp_path, seed=SEED, duration=SECONDS, gap=1.0, aggregators=2, workers=3)

    report.verdict.require_good()
    assert report.problems == [], (tmp_path / "chaos.log").read_text()
    # And it was no idle promise.
    assert report.kills > 0
    assert report.verdict.confirmed > 0
