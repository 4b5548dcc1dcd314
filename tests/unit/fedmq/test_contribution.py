"""What workers are worth: a small federation of real training, valued in every way, and one that is known by hand."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from aggregator.coalitions import PlayedRound
from aggregator.core.snapshot import SnapshotHead
from aggregator.lineage import Lineage, Replay
from aggregator.valuation import exact_shapley
from fedmq.contribution import FIRST_ORDER, Contribution, valued
from tests.support.commands import fedmq
from tests.support.ondisk import OnDisk
from worker_client.config import WorkerConfig
from worker_client.task import Task
from worker_client.valuing import HeldOut

WORKERS = ("a", "b", "c", "d", "e", "f")


class Blobs(Task):
    """Three classes in ten dimensions, logistic regression; float64, so that values are not rounding errors."""

    def model(self) -> nn.Module:
        return nn.Linear(10, 3).double()

    def test_data(self) -> TensorDataset:
        return blobs(300, seed=100)


def blobs(count: int, seed: int, flipped: float = 0.0, noise: float = 1.0) -> TensorDataset:
    generator = np.random.default_rng(seed)
    centres = np.random.default_rng(0).normal(size=(3, 10))
    labels = generator.integers(0, 3, count)
    points = centres[labels] + noise * generator.normal(size=(count, 10))
    wrong = generator.random(count) < flipped
    return TensorDataset(torch.from_numpy(points), torch.from_numpy(np.where(wrong, (labels + 1) % 3, labels)))


#: More and less data, better and worse ones.
SITES = {
    "a": blobs(200, 1),
    "b": blobs(100, 2, noise=2.0),
    "c": blobs(20, 3),
    "d": blobs(100, 4, flipped=0.4),
    "e": blobs(100, 5, flipped=0.9),
    "f": blobs(100, 6, noise=4.0),
}


def trained(parameters: dict[str, Any], data: TensorDataset) -> dict[str, Any]:
    """What ten steps of gradient descent change."""
    points, labels = data.tensors
    weight = torch.tensor(parameters["weight"], requires_grad=True)
    bias = torch.tensor(parameters["bias"], requires_grad=True)
    for _ in range(10):
        loss: Tensor = nn.functional.cross_entropy(points @ weight.T + bias, labels)
        for tensor, slope in zip((weight, bias), torch.autograd.grad(loss, (weight, bias)), strict=True):
            tensor.data -= 0.1 * slope
    return {
        "weight": weight.detach().numpy() - parameters["weight"],
        "bias": bias.detach().numpy() - parameters["bias"],
    }


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OnDisk]:
    start = {"weight": np.zeros((3, 10)), "bias": np.zeros(3)}
    run = OnDisk(tmp_path_factory.mktemp("run"), start, buffer_size=len(WORKERS))
    for _ in range(4):
        base = {name: np.array(array) for name, array in run.machine.parameters.items()}
        for worker in WORKERS:
            run.publish(worker, trained(base, SITES[worker]))
        run.settle()
    assert run.version == 4
    yield run
    run.close()


@pytest.fixture(scope="module")
def held_out() -> HeldOut:
    return HeldOut(Blobs(), WorkerConfig(name="e", device="cpu", batch_size=128))


def rounds(run: OnDisk) -> Iterator[PlayedRound]:
    lineage = Lineage(run.folder, run.store)
    head: SnapshotHead = run.store.load()
    lineage.refresh(head)
    replay = Replay(lineage, run.store)
    replay.plan(run.version)
    return replay.rounds()


def total(run: OnDisk, held_out: HeldOut, method: str) -> Contribution:
    found = Contribution()
    for played in rounds(run):
        found.add(played, *valued(played, held_out, method))
    return found


def correlation(one: Contribution, other: Contribution) -> float:
    assert one.values.keys() == other.values.keys()
    pairs = np.array([[one.values[worker], other.values[worker]] for worker in WORKERS])
    return float(np.corrcoef(pairs.T)[0, 1])


def test_shapley_values_add_up_to_what_was_gained(run: OnDisk, held_out: HeldOut) -> None:
    exact = total(run, held_out, "exact-shapley")
    before = held_out.loss({"weight": np.zeros((3, 10)), "bias": np.zeros(3)})

    assert exact.gain == pytest.approx(before - held_out.loss(run.machine.parameters))
    assert sum(exact.values.values()) == pytest.approx(exact.gain)
    assert exact.updates == dict.fromkeys(WORKERS, 4)
    assert min(exact.values, key=lambda worker: exact.values[worker]) == "e", "whose labels are wrong"


@pytest.mark.parametrize(("method", "least"), [("gtg-shapley", 0.99), (FIRST_ORDER, 0.95), ("leave-one-out", 0.95)])
def test_cheaper_values_go_with_the_exact_ones(run: OnDisk, held_out: HeldOut, method: str, least: float) -> None:
    assert correlation(total(run, held_out, method), total(run, held_out, "exact-shapley")) >= least


def test_first_order_values_are_about_what_was_gained(run: OnDisk, held_out: HeldOut) -> None:
    found = total(run, held_out, FIRST_ORDER)

    assert sum(found.values.values()) == pytest.approx(found.gain, rel=0.05)


def test_a_coalitions_parameters_are_what_its_updates_alone_would_have_made(run: OnDisk) -> None:
    played = next(iter(rounds(run)))
    deltas = {update.id.worker: update.tensors["bias"] for update in played.updates}

    assert played.workers == WORKERS
    assert played.parameters(frozenset()) is played.before.parameters
    found = played.parameters(frozenset({"a", "e"}))["bias"]
    np.testing.assert_allclose(found, (np.asarray(deltas["a"]) + np.asarray(deltas["e"])) / 2, rtol=1e-12)
    np.testing.assert_allclose(played.before.parameters["bias"], 0.0)


def test_a_quadratic_losss_first_order_values_are_its_shapley_values_with_the_rounds_divisor(run: OnDisk) -> None:
    """Half of ||x - 1||^2, whose gradient halfway is known; exact for coalitions that keep the whole divisor."""
    played = list(rounds(run))[1]
    start = played.before.parameters["weight"]
    steps = {update.id.worker: np.asarray(update.tensors["weight"]) / len(WORKERS) for update in played.updates}

    def utility(coalition: frozenset[str]) -> float:
        x = start + sum((steps[worker] for worker in sorted(coalition)), np.zeros_like(start))
        return -float(((x - 1) ** 2).sum()) / 2

    halfway = played.halfway()
    values = played.first_order({"weight": halfway["weight"] - 1, "bias": np.zeros(3)})

    assert values == pytest.approx(exact_shapley(WORKERS, utility))


def test_held_out_loss_and_gradient_are_torchs(held_out: HeldOut) -> None:
    generator = np.random.default_rng(0)
    parameters = {"weight": generator.normal(size=(3, 10)), "bias": generator.normal(size=3)}
    points, labels = blobs(300, seed=100).tensors
    weight = torch.tensor(parameters["weight"], requires_grad=True)
    loss = nn.functional.cross_entropy(points @ weight.T + torch.tensor(parameters["bias"]), labels)
    (slope,) = torch.autograd.grad(loss, weight)

    assert held_out.examples == 300
    assert held_out.loss(parameters) == pytest.approx(loss.item())
    np.testing.assert_allclose(held_out.gradient(parameters)["weight"], slope.numpy(), rtol=1e-9, atol=1e-12)


def test_the_command_tells_and_keeps_what_it_found(run: OnDisk) -> None:
    (run.folder / "task.py").write_text("from tests.unit.fedmq.test_contribution import Blobs\n")
    options = ["--run", "test", "--folder", str(run.folder), "--task", "task:Blobs"]

    done = fedmq(run.folder, "contribution", *options, "--since", "3", "--json")

    assert done.code == 0, done
    report = json.loads(done.out)
    assert (report["rounds"], report["method"]) == (2, FIRST_ORDER)
    assert {row["worker"] for row in report["workers"]} == set(WORKERS)
    assert json.loads((Path(run.folder) / "contribution.json").read_text()) == report
