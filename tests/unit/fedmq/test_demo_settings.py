"""The demonstration's own settings give way to the user's."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.config import AggregatorConfig
from broker.errors import ConfigError
from fedmq.demo import demo_settings, members_of


@pytest.mark.parametrize(("strategy", "weighting"), [("mean", "examples"), ("median", "uniform")])
def test_weights_are_what_the_strategy_goes_with(
    strategy: str, weighting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    settings = demo_settings(None, [("aggregator.strategy", strategy)])
    assert settings.table("aggregator", AggregatorConfig).recipe().weighting == weighting


def test_each_program_has_a_port_of_its_own_for_its_metrics(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    settings = demo_settings(None, [("metrics.port", 9464), ("demo.workers", 2)])

    ports = {member.name: member.settings["metrics.port"] for member in members_of(settings)}
    assert ports == {"aggregator": 9464, "evaluator": 9465, "w0": 9466, "w1": 9467}
    assert all("metrics.port" not in member.settings for member in members_of(demo_settings(None, [])))
    with pytest.raises(ConfigError, match=r"metrics\.port"):
        demo_settings(None, [("metrics.port", 65533), ("demo.workers", 2)])
