"""The exponential average of a worker's own updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from broker.memory import MemoryBroker
from broker.messages import DTYPES, ModelSpec, ParametersHead, Plan, TensorRole, TensorSpec, Update, Work
from tests.unit.worker_client.ends import Aggregator, running
from tests.unit.worker_client.models import Points, config, version_of
from worker_client.momentum import FILE, Momentum
from worker_client.training import Trained, Trainer

MODEL = ModelSpec(
    (
        TensorSpec("w", (5,), "float32"),
        TensorSpec("half", (5,), "bfloat16"),
        TensorSpec("mean", (5,), "float32", TensorRole.STATISTIC),
    )
)


def head(beta: float = 0.9) -> ParametersHead:
    return ParametersHead(run="r", epoch=1, version=0, plan=Plan(work=Work(momentum=beta)), digest="0" * 64)


def trained(seed: int) -> Trained:
    random = np.random.default_rng(seed)
    tensors = {t.name: random.normal(size=t.shape).astype(DTYPES[t.dtype]) for t in MODEL.tensors}
    return Trained(tensors=tensors, examples=1, metrics={}, seconds=0.0)


@pytest.mark.parametrize("on_disk", [False, True])
def test_what_is_sent_is_the_average(tmp_path: Path, on_disk: bool) -> None:
    """m_1 = u_1, m_t = beta m_{t-1} + (1 - beta) u_t; a restart in between changes nothing."""
    folder = tmp_path if on_disk else None
    average, expected = Momentum(folder, MODEL), np.zeros(5)
    for number in range(6):
        if on_disk:
            average = Momentum(folder, MODEL)
        update = trained(number)
        beta = 0.9 if number else 0.0
        expected = beta * expected + (1 - beta) * update.tensors["w"].astype(np.float64)

        sent = average(update, head())

        np.testing.assert_allclose(sent.tensors["w"], expected, rtol=1e-5)
        assert {n: a.dtype for n, a in sent.tensors.items()} == {n: a.dtype for n, a in update.tensors.items()}
        assert sent.tensors["mean"] is update.tensors["mean"]


def test_half_precision_is_averaged_in_single() -> None:
    average, update = Momentum(None, MODEL), trained(0)
    average(update, head(0.999))
    for _ in range(300):
        # Each step is far below what bfloat16 can tell from the value before.
        last = average(replaced(update, 0.0), head(0.999))
    kept = last.tensors["half"].astype(np.float32) / update.tensors["half"].astype(np.float32)
    np.testing.assert_allclose(kept, 0.999**300, rtol=0.01)


def replaced(update: Trained, factor: float) -> Trained:
    tensors = {name: (array.astype(np.float32) * factor).astype(array.dtype) for name, array in update.tensors.items()}
    return Trained(tensors=tensors, examples=1, metrics={}, seconds=0.0)


def test_without_it_updates_stay_as_they_are_and_a_later_average_begins_anew() -> None:
    average = Momentum(None, MODEL)
    average(trained(0), head())
    update = trained(1)
    assert average(update, head(0.0)) is update
    np.testing.assert_array_equal(average(trained(2), head()).tensors["w"], trained(2).tensors["w"])


def test_an_update_that_is_not_finite_does_not_count() -> None:
    average = Momentum(None, MODEL)
    average(trained(0), head())
    bad = trained(1)
    bad.tensors["w"][2] = np.nan

    assert average(bad, head()) is bad

    expected = 0.9 * trained(0).tensors["w"] + 0.1 * trained(2).tensors["w"]
    np.testing.assert_allclose(average(trained(2), head()).tensors["w"], expected, rtol=1e-5)


def test_a_damaged_file_is_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Momentum(tmp_path, MODEL)(trained(0), head())
    content = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(content[:50])

    sent = Momentum(tmp_path, MODEL)(trained(1), head())

    np.testing.assert_array_equal(sent.tensors["w"], trained(1).tensors["w"])
    assert "cannot be read" in caplog.text


def test_a_worker_goes_on_with_its_average_in_its_next_life(tmp_path: Path) -> None:
    broker, task = MemoryBroker(), Points()
    aggregator = Aggregator(broker, task)
    plan = {"work": Work(momentum=0.75)}
    updates = []
    for version in (0, 1):
        with running(broker, task, folder=tmp_path):
            aggregator.broadcast(version, **plan)
            updates += aggregator.wait_for(lambda: aggregator.of(Update, base_version=version))  # noqa: B023

    first, second = updates
    assert first.id.incarnation != second.id.incarnation
    assert (first.steps, first.effort) == (2, 2.0)
    # A training is the same for the same inputs.
    own = Trainer(task, config()).train(version_of(aggregator.model, aggregator.tensors, 1)).tensors
    for name, array in own.items():
        np.testing.assert_allclose(second.tensors[name], 0.75 * first.tensors[name] + 0.25 * array, atol=1e-7)
