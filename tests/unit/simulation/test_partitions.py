"""Cuts of a data set: everything is somebody's, once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from broker.errors import ConfigError
from fedmq.simulation.partitions import cut
from fedmq.simulation.scenario import DataTable

LABELS = np.arange(600) % 6
GROUPS = np.arange(600) // 20  # thirty groups


def parts_of(seed: int = 0, workers: int = 12, **settings: Any) -> list[Any]:
    return cut(DataTable(**settings), 600, workers, labels=LABELS, groups=GROUPS, seed=seed)


@pytest.mark.parametrize("partition", ["iid", "dirichlet", "label", "quantity", "groups"])
def test_every_example_is_somebodys_once_and_the_seed_decides(partition: str) -> None:
    parts = parts_of(partition=partition)

    assert sorted(np.concatenate(parts).tolist()) == list(range(600))
    assert all(len(part) >= 2 for part in parts)
    assert [p.tolist() for p in parts] == [p.tolist() for p in parts_of(partition=partition)]
    assert [p.tolist() for p in parts] != [p.tolist() for p in parts_of(partition=partition, seed=1)]


def test_few_classes_each() -> None:
    parts = parts_of(partition="label", labels=1, workers=6)

    assert [len(set(LABELS[part].tolist())) for part in parts] == [1] * 6


def test_unlike_amounts() -> None:
    sizes = [len(part) for part in parts_of(partition="quantity", alpha=0.2, minimum=5)]

    assert min(sizes) >= 5
    assert max(sizes) > 3 * 600 / 12


def test_groups_stay_whole_and_nobody_has_many_more() -> None:
    parts = parts_of(partition="groups")

    groups = [set(GROUPS[part].tolist()) for part in parts]
    assert sum(map(len, groups)) == 30
    assert {len(own) for own in groups} == {2, 3}


@pytest.mark.parametrize(
    ("settings", "workers", "complaint"),
    [
        ({"partition": "iid", "minimum": 2}, 301, "600 examples cannot be cut for 301 workers"),
        ({"partition": "label", "labels": 7}, 12, r"data\.labels = 7, but the data have 6 classes"),
        ({"partition": "label", "labels": 6}, 101, "cannot be cut into 101 x 6 pieces"),
        ({"partition": "groups"}, 31, "30 natural groups: too few for 31 workers"),
    ],
)
def test_what_cannot_be_cut_is_refused(settings: dict[str, Any], workers: int, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        parts_of(workers=workers, **settings)


@pytest.mark.parametrize(("partition", "complaint"), [("dirichlet", "needs classes"), ("groups", "natural groups")])
def test_what_the_data_do_not_have_is_named(partition: Any, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        cut(DataTable(partition=partition), 600, 12, labels=None, groups=None, seed=0)
