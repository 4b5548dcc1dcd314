"""The demonstration's own settings give way to the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.config import AggregatorConfig
from fedmq.demo import demo_settings


@pytest.mark.parametrize(("strategy", "weighting"), [("mean", "examples"), ("median", "uniform")])
def test_weights_are_what_the_strategy_goes_with(
    strategy: str, weighting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = demo_settings(None, [("aggregator.strategy", strategy)])
    assert settings.table("aggregator", AggregatorConfig).recipe().weighting == weighting
