"""Real training in virtual time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from broker.errors import ConfigError, TaskError
from fedmq.simulation.record import Result
from fedmq.simulation.run import objective_of, simulate
from fedmq.simulation.tasks import flipped, labels_of, subset
from tests.support.scenarios import scenario_of
from tests.support.tasks import Line
from worker_client.task import Examples, Shard

LINE: dict[str, Any] = {
    "objective.kind": "task",
    "worker.task": "tests.support.tasks:Line",
    "worker.learning_rate": 0.05,
    "run.updates": 60,
}
DIGITS: dict[str, Any] = {
    "objective.kind": "task",
    "worker.task": "worker_client.tasks.digits:Digits",
    "worker.local_steps": 1,
    "run.updates": 8,
    "aggregator.buffer_size": 4,
    "data.partition": "label",
    "population.workers": 10,
}


class Spoiled(Line):
    """Its data are gone."""

    def data(self, shard: Shard) -> Examples:
        raise KeyError("gone")


class Watched(Line):
    """Tells which shards it was asked for."""

    shards: ClassVar[list[Shard]] = []

    def data(self, shard: Shard) -> Examples:
        self.shards.append(shard)
        return super().data(shard)


class Grouped(Line):
    """Cannot name its groups."""

    def groups(self, dataset: Examples) -> list[int]:
        raise ValueError(f"{len(dataset)} examples without names")


def run(folder: Path, base: dict[str, Any], **changes: Any) -> Result:
    return simulate(scenario_of(folder, base | {k.replace("__", "."): v for k, v in changes.items()}))


def test_a_task_learns_and_the_same_seed_gives_the_same_bits(tmp_path: Path) -> None:
    first, again = run(tmp_path, LINE), run(tmp_path, LINE)

    assert first.digest == again.digest
    assert first.points[-1].metrics["loss"] < first.points[0].metrics["loss"] / 10


def test_a_codec_is_applied_to_what_travels(tmp_path: Path) -> None:
    plain, coded = run(tmp_path, DIGITS), run(tmp_path, DIGITS, aggregator__update_codec="int8")

    assert coded.bytes_up < plain.bytes_up / 2
    assert coded.updates == plain.updates == 8


def test_the_split_can_be_counted(tmp_path: Path) -> None:
    counts = objective_of(scenario_of(tmp_path, DIGITS)).counts()

    assert counts is not None
    assert counts.shape == (10, 10)
    assert counts.sum() == 1437
    assert np.count_nonzero(counts, axis=1).max() <= 4  # two pieces, each of which may cross a border


def test_bad_workers_send_something_else(tmp_path: Path) -> None:
    honest = run(tmp_path, LINE)
    flipping = run(tmp_path, LINE, attack__kind="sign-flip", attack__share=0.3)
    nobody = run(tmp_path, LINE, attack__kind="sign-flip", attack__share=0.0)

    assert honest.digest == nobody.digest
    assert flipping.points[-1].metrics["loss"] > honest.points[-1].metrics["loss"]


def test_flipped_labels_are_flipped_in_both_kinds_of_data_sets() -> None:
    inputs, labels = torch.arange(6.0).reshape(6, 1), torch.tensor([0, 1, 2, 0, 1, 2])
    rows = [(inputs[i], int(labels[i])) for i in range(6)]

    for dataset in (TensorDataset(inputs, labels), rows):
        chosen = subset(dataset, np.array([1, 2, 3]))
        found = labels_of(flipped(chosen, 3))
        assert found is not None
        assert found.tolist() == [1, 0, 2]


def test_labels_that_are_none_are_none() -> None:
    assert labels_of(TensorDataset(torch.zeros(3, 1), torch.zeros(3))) is None
    assert labels_of([1.0, 2.0]) is None
    assert labels_of([(0.5, -100), (0.5, 1)]) is None
    assert labels_of(TensorDataset(torch.zeros(2), torch.tensor([3, 10**9]))) is None
    assert labels_of([]) is None


@pytest.mark.parametrize(
    ("changes", "error", "complaint"),
    [
        ({"data.partition": "dirichlet"}, ConfigError, "needs classes"),
        ({"data.partition": "groups"}, ConfigError, "give the task a method groups"),
        ({"attack.kind": "label-flip", "attack.share": 0.5}, ConfigError, "needs classes"),
        ({"attack.kind": "sing-flip"}, ConfigError, "did you mean sign-flip"),
        (
            {"worker.task": f"{__name__}:Spoiled", "data.partition": "iid"},
            TaskError,
            "Spoiled.data raised KeyError: 'gone'",
        ),
        (
            {"worker.task": f"{__name__}:Grouped", "data.partition": "groups"},
            TaskError,
            "Grouped.groups raised ValueErr",
        ),
        ({"worker.task": "tests.support.tasks:Lime"}, TaskError, "did you mean 'Line'"),
    ],
)
def test_what_this_task_cannot_do_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], complaint: str
) -> None:
    with pytest.raises(error, match=complaint):
        objective_of(scenario_of(tmp_path, LINE | changes))


def test_what_runs_ask_of_local_work_is_asked_of_simulated_workers_too(tmp_path: Path) -> None:
    plain = run(tmp_path, LINE)
    for changes in ({"aggregator__worker_momentum": 0.5}, {"aggregator__proximal": 2.0}):
        changed = run(tmp_path, LINE, **changes)
        assert changed.digest != plain.digest
        assert changed.points[-1].metrics["loss"] < changed.points[0].metrics["loss"] / 2


@pytest.mark.parametrize(("workers", "shards"), [(None, 2), (1, 2), (5, 5)])
def test_of_a_trace_workers_says_how_many_shards_there_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int | None, shards: int
) -> None:
    monkeypatch.setattr(Watched, "shards", [])
    (tmp_path / "trace.csv").write_text("worker,start,end\nb,0,2\na,0,1\n")
    changes = {"worker.task": f"{__name__}:Watched", "population.trace": str(tmp_path / "trace.csv")}

    run(tmp_path, LINE | changes, aggregator__buffer_size=2, population__workers=workers)

    assert [shard for shard in Watched.shards if shard.worker != "test"] == [
        Shard("a", 0, shards),
        Shard("b", 1, shards),
    ]
