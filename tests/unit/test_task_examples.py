from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from broker.messages import Mode
from tests.unit.worker_client.models import config, version_of
from worker_client.loading import load_task
from worker_client.training import Trainer, initial_parameters

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", ["examples.own_model:Wine", "examples.own_training:ProximalWine"])
def test_an_example_learns(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # Given
    monkeypatch.chdir(ROOT)
    task = load_task(name)
    trainer = Trainer(task, config(local_epochs=40, shard="1/2"))
    model, start = initial_parameters(task)

    # When
    delta = trainer.train(version_of(model, start, mode=Mode.DELTA)).tensors
    metrics = trainer.evaluate(version_of(model, {n: a + delta[n] for n, a in start.items()}, 1)).metrics

    # Then
    assert all(np.isfinite(array).all() for array in delta.values())
    assert metrics["accuracy"] > 0.8


def test_the_example_of_the_front_page_is_short() -> None:
    assert len((ROOT / "examples/own_model.py").read_text().splitlines()) <= 25
