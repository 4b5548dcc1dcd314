from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray
from torch.utils.data import TensorDataset

from broker.errors import TaskError
from broker.messages import Mode, TensorRole
from tests.unit.worker_client.models import config, version_of
from worker_client.task import Shard
from worker_client.tasks.digits import Digits
from worker_client.tasks.partition import dirichlet, iid
from worker_client.training import Trainer, initial_parameters

LABELS: NDArray[np.int64] = np.arange(1000) % 10


def mixture(labels: NDArray[np.int64], parts: list[NDArray[np.int64]]) -> float:
    """How unlike the parts are: mean distance of their shares of classes from the whole's; 0 to 1."""
    shares = np.array([np.bincount(labels[part], minlength=10) / len(part) for part in parts])
    return float(np.abs(shares - 0.1).sum(axis=1).mean() / 2)


@pytest.mark.parametrize("count", [1, 3, 10, 100])
@pytest.mark.parametrize("alpha", [0.05, 0.3, 100.0])
def test_a_dirichlet_cut_uses_each_example_once_and_leaves_no_shard_too_small(count: int, alpha: float) -> None:
    parts = dirichlet(LABELS, count, alpha=alpha, minimum=8)

    assert len(parts) == count
    assert sorted(np.concatenate(parts).tolist()) == list(range(1000))
    assert min(map(len, parts)) >= 8


def test_a_smaller_alpha_gives_more_unlike_shards() -> None:
    measured = [mixture(LABELS, dirichlet(LABELS, 8, alpha=alpha)) for alpha in (0.1, 1.0, 10.0, 1000.0)]

    assert all(more > less for more, less in pairwise(measured))
    assert measured[0] > 0.5
    assert measured[-1] < 0.1


def test_an_iid_cut_uses_each_example_once_in_equal_shares() -> None:
    parts = iid(103, 10)

    assert sorted(np.concatenate(parts).tolist()) == list(range(103))
    assert {len(part) for part in parts} == {10, 11}


def test_a_cut_depends_on_nothing_but_its_seed() -> None:
    for one, same, other in zip(
        dirichlet(LABELS, 4, seed=1), dirichlet(LABELS, 4, seed=1), dirichlet(LABELS, 4, seed=2), strict=True
    ):
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


def test_too_many_shards_are_refused() -> None:
    with pytest.raises(TaskError, match="1000 examples cannot be cut into 101 shards of at least 10"):
        dirichlet(LABELS, 101)
    with pytest.raises(TaskError):
        iid(3, 4)


@pytest.mark.parametrize("alpha", [0.3, None])
def test_the_shards_of_the_digits_are_disjoint_and_apart_from_the_held_out_ones(alpha: float | None) -> None:
    task = Digits(alpha)
    shards = [task.data(Shard(f"w{n}", n, 4)) for n in range(4)]

    def images(dataset: TensorDataset) -> list[bytes]:
        return [image.numpy().tobytes() for image in dataset.tensors[0]]

    assert sum(map(len, shards)) == 1437
    assert len(task.test_data()) == 360
    held_out = set(images(task.test_data()))
    assert not any(held_out & set(images(shard)) for shard in shards)


def test_the_digits_are_learned_centrally() -> None:
    # Given all of the data in one place
    task = Digits()
    trainer = Trainer(task, config(local_epochs=8, learning_rate=0.05))
    model, start = initial_parameters(task)

    # When
    update = trainer.train(version_of(model, start, mode=Mode.DELTA)).tensors
    values = {t.name for t in model.tensors if t.role is TensorRole.STATISTIC}
    trained = {name: update[name] if name in values else old + update[name] for name, old in start.items()}
    metrics = trainer.evaluate(version_of(model, trained, 1)).metrics

    # Then
    assert metrics["accuracy"] >= 0.97
