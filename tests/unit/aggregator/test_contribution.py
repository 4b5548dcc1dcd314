"""What each worker brought to a small federation, against the exact answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from aggregator.ancestry import Ancestry
from aggregator.contribution import METHODS, Contributions, Kept
from aggregator.rollback import find_checkpoint, open_lineage, roll_back
from broker.errors import LineageError
from broker.messages import Array, Mode, Tensors
from tests.support.ondisk import OnDisk

FEATURES, CLASSES = 8, 4
MODEL = {"w": np.zeros((FEATURES, CLASSES), np.float32), "b": np.zeros(CLASSES, np.float32)}
TRUE = np.random.default_rng(0).standard_normal((FEATURES, CLASSES))


def drawn(count: int, seed: int, noise: float = 0.0) -> tuple[Array, Array]:
    """Inputs and classes; a part of the labels is drawn anew."""
    source = np.random.default_rng(seed)
    inputs = source.standard_normal((count, FEATURES))
    labels = (inputs @ TRUE + source.gumbel(size=(count, CLASSES))).argmax(1)
    spoiled = source.random(count) < noise
    labels[spoiled] = source.integers(0, CLASSES, int(spoiled.sum()))
    return inputs, labels


class Softmax:
    """A judge: multinomial regression on held-out data."""

    def __init__(self, data: tuple[Array, Array]) -> None:
        self.inputs, self.labels = data

    def _chances(self, parameters: Tensors) -> Array:
        scores = self.inputs @ parameters["w"].astype(np.float64) + parameters["b"]
        powers = np.exp(scores - scores.max(1, keepdims=True))
        return np.asarray(powers / powers.sum(1, keepdims=True))

    def loss(self, parameters: Tensors) -> float:
        chances = self._chances(parameters)
        return float(-np.log(chances[np.arange(len(self.labels)), self.labels]).mean())

    def gradient(self, parameters: Tensors) -> Tensors:
        wrong = self._chances(parameters)
        wrong[np.arange(len(self.labels)), self.labels] -= 1
        return {"w": self.inputs.T @ wrong / len(self.labels), "b": wrong.mean(0)}


HELD_OUT = Softmax(drawn(500, 99))
#: The second has the first one's data; labels are spoiled more and more; the last has little.
SHARDS = {
    "good": drawn(120, 1),
    "twin": drawn(120, 1),
    "noisy": drawn(120, 2, 0.4),
    "worse": drawn(120, 3, 0.8),
    "random": drawn(120, 4, 1.0),
    "small": drawn(6, 5),
}


def trained(parameters: Mapping[str, Array], data: tuple[Array, Array], rate: float = 0.5) -> dict[str, Array]:
    """A delta: five steps of gradient descent."""
    own, model = Softmax(data), {name: array.astype(np.float64) for name, array in parameters.items()}
    for _ in range(5):
        gradient = own.gradient(model)
        model = {name: array - rate * gradient[name] for name, array in model.items()}
    return {name: (model[name] - parameters[name]).astype(np.float32) for name in model}


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., OnDisk]]:
    made: list[OnDisk] = []

    def build(**config: Any) -> OnDisk:
        made.append(OnDisk(tmp_path / str(len(made)), MODEL, buffer_size=len(SHARDS), **config))
        return made[-1]

    yield build
    for one in made:
        one.close()


def go_on(run: OnDisk, rounds: int, workers: Mapping[str, tuple[Array, Array]] = SHARDS) -> None:
    for _ in range(rounds):
        base = run.machine.parameters
        for worker, data in workers.items():
            run.publish(worker, trained(base, data), examples=len(data[1]))
        run.settle()


def found(
    run: OnDisk, method: str, *, judge: Any = HELD_OUT, version: int | None = None, seed: int = 0
) -> Contributions:
    lineage = open_lineage(run.folder, run.store)
    head = run.store.head()
    version = head.version if version is None else version
    workers = Ancestry(run.folder / "history.jsonl", head.records).workers(version)
    return METHODS[method](Kept(lineage, run.store, frozenset(workers)), version, judge, seed, lambda *_: None)


def pearson(one: Contributions, other: Contributions) -> float:
    assert list(one.totals) == list(other.totals)
    return float(np.corrcoef(list(one.totals.values()), list(other.totals.values()))[0, 1])


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"weighting": "examples", "momentum": 0.5},
        {"optimizer": "adam"},
        {"optimizer": "lamb", "weighting": "examples"},
        {"strategy": "multi-krum"},
    ],
)
def test_a_small_federation_against_all_coalitions(make: Callable[..., OnDisk], config: dict[str, Any]) -> None:
    run = make(**config)
    go_on(run, 6)

    exact, sampled, first = (found(run, method) for method in ("exact-shapley", "gtg-shapley", "first-order"))

    assert sum(exact.totals.values()) == pytest.approx(exact.before - exact.after, abs=1e-9)
    assert min(exact.totals, key=lambda worker: exact.totals[worker]) == "random"
    assert exact.totals["good"] == pytest.approx(exact.totals["twin"], abs=1e-9)
    assert pearson(sampled, exact) >= 0.99
    assert pearson(first, exact) >= 0.95
    assert (sampled.base_version, sampled.version, list(sampled.by_version)) == (0, 6, [1, 2, 3, 4, 5, 6])
    assert (sampled.before, sampled.after) == (exact.before, exact.after) == (first.before, first.after)
    # Of two workers that send the same, either or both are one model; and a version is where the next round starts.
    most = 1 + 6 * (3 * 2**4 - 2)
    assert first.losses == 2 < sampled.losses <= exact.losses <= most
    # A rule that takes some of them gives several coalitions one model, too.
    assert (exact.losses == most) == ("strategy" not in config)


def test_leave_one_out_is_the_run_that_never_had_the_worker(make: Callable[..., OnDisk]) -> None:
    run, never = make(), make()
    base = [run.random(seed) for seed in range(3)]
    updates = {worker: [run.random(7 * seed + ord(worker), 0.1) for seed in range(3)] for worker in "abcdef"}
    for number in range(len(base)):
        for worker, tensors in updates.items():
            run.publish(worker, tensors[number])
            if worker != "c":
                never.publish(worker, tensors[number])
        run.settle()
        never.settle()
        if never.version == number:  # its round lacks one: close it
            never.order(buffer_size=5)
            never.settle()

    result = found(run, "leave-one-out")

    model = {"w": MODEL["w"].astype(np.float64), "b": MODEL["b"].astype(np.float64)}
    for number in range(len(base)):
        for name, array in model.items():
            others = [tensors[number][name] for worker, tensors in updates.items() if worker != "c"]
            np.add(array, np.mean(others, axis=0), out=array)
    assert result.totals["c"] == pytest.approx(HELD_OUT.loss(model) - result.after, abs=1e-6)
    assert not result.by_version
    assert (result.losses, len(result.totals)) == (8, 6)


class Parabola:
    """Half the squared distance from a place, so that second order is all there is."""

    def __init__(self, to: float) -> None:
        self.to = to

    def loss(self, parameters: Tensors) -> float:
        return sum(float(np.square(array.astype(np.float64) - self.to).sum()) / 2 for array in parameters.values())

    def gradient(self, parameters: Tensors) -> Tensors:
        return {name: array.astype(np.float64) - self.to for name, array in parameters.items()}


@pytest.mark.parametrize(
    "config",
    [
        *({"mode": mode} for mode in Mode),
        {"strategy": "fednova"},
        {"optimizer": "adam"},
        {"mode": Mode.GRADIENT, "optimizer": "yogi", "momentum": 0.5},
        {"strategy": "median", "byzantine": 0},
        {"strategy": "centered-clipping", "byzantine": 0},
    ],
    ids=str,
)
def test_first_order_values_of_a_parabola_add_up_to_what_its_loss_fell(
    make: Callable[..., OnDisk], config: dict[str, Any]
) -> None:
    run = make(learning_rate=0.3, **config)
    for number in range(12):
        run.publish("abcd"[number % 4], run.random(number), lag=number % 3, effort=1.0 + number % 5)
        run.settle()

    result = found(run, "first-order", judge=Parabola(1.0))

    assert run.version == 2
    assert sum(result.totals.values()) == pytest.approx(result.before - result.after, rel=1e-4)
    assert max(map(abs, result.totals.values())) > 0.01


def test_of_many_workers_what_each_would_have_made_alone_tells_enough(
    make: Callable[..., OnDisk], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(optimizer="adam")
    go_on(run, 6)
    both = found(run, "first-order")
    monkeypatch.setattr("aggregator.contribution.MOST_WITHOUT", 5)

    alone = found(run, "first-order")

    assert alone.totals != both.totals
    assert sum(alone.totals.values()) == pytest.approx(sum(both.totals.values()), rel=1e-9)
    assert pearson(alone, found(run, "exact-shapley")) >= 0.95


def test_a_worker_in_a_round_that_was_left_out_is_seen_by_what_the_others_would_have_made(
    make: Callable[..., OnDisk],
) -> None:
    """One update that explodes spoils its round; in all coalitions without it the others' step is made."""
    run = make(weighting="examples", learning_rate=1.2)
    go_on(run, 1)
    spoiler = {name: np.zeros_like(array) for name, array in MODEL.items()}
    spoiler["w"][0, 0] = 1.8e19  # its square is still a number, and that of the step is not
    base = run.machine.parameters
    for worker, data in list(SHARDS.items())[:4]:
        run.publish(worker, trained(base, data))
    for _ in range(2):
        run.publish("small", spoiler, examples=1000)
    run.settle()
    assert run.version == 2

    result = found(run, "exact-shapley")

    assert sum(result.by_version[2].values()) == pytest.approx(0, abs=1e-9)
    assert result.by_version[2]["small"] < -0.01 < result.by_version[2]["good"]
    assert found(run, "first-order").by_version[2] == dict.fromkeys(result.by_version[2], 0.0)
    # Without it the round counts.
    assert found(run, "leave-one-out").totals["small"] < 0


def test_what_was_in_the_base_already_stays_in_every_model(make: Callable[..., OnDisk]) -> None:
    run = make(keep_updates=False, commit_count=1)
    base = run.machine.parameters
    for number, (worker, data) in enumerate(SHARDS.items()):
        if number == 2:
            run.restart(keep_updates=True)
        run.publish(worker, trained(base, data))
        run.settle()

    result = found(run, "exact-shapley")

    assert result.stuck == 2
    assert result.totals["good"] == result.totals["twin"] == 0.0
    assert all(abs(result.totals[worker]) > 1e-6 for worker in ("noisy", "worse", "random", "small"))
    assert found(run, "leave-one-out").stuck == 2


def test_of_a_rule_that_needs_all_updates_coalitions_are_judged_by_the_rule(make: Callable[..., OnDisk]) -> None:
    """Also where the round was open when updates began to be kept, and its rows are on the disk."""
    run = make(strategy="median", keep_updates=False, commit_count=1)
    base = run.machine.parameters
    for number, worker in enumerate("abcdef"):
        if number == 1:
            run.restart(keep_updates=True)
        pace = 30.0 if worker == "f" else 0.1
        run.publish(worker, {name: base[name] + pace for name in base})
        run.settle()
    files = sorted(run.store.folder.iterdir())

    result = found(run, "exact-shapley", judge=Parabola(0.1))

    assert result.stuck == 1
    assert sum(result.totals.values()) == pytest.approx(result.before - result.after - 0.5 * 36 * 0.1**2, abs=1e-4)
    assert result.totals["b"] == pytest.approx(result.totals["e"], abs=1e-5)
    assert result.totals["f"] < result.totals["b"]
    assert sorted(run.store.folder.iterdir()) == files


def test_of_a_run_that_was_taken_back_what_counts_is_what_its_version_is_made_of(make: Callable[..., OnDisk]) -> None:
    run = make()
    go_on(run, 3)
    before = found(run, "gtg-shapley", version=1)
    lineage = open_lineage(run.folder, run.store)
    state = find_checkpoint(lineage, run.store, 1)
    assert state is not None
    roll_back(lineage, run.store, 1, state.parameters, state.optimizer)
    run.restart()

    result = found(run, "gtg-shapley")

    assert (result.version, list(result.by_version)) == (4, [1])
    assert result.totals == before.totals


class Diverged(Softmax):
    """Its loss is no number once a weight is large."""

    def loss(self, parameters: Tensors) -> float:
        return super().loss(parameters) if float(np.abs(parameters["w"]).max()) < 50 else math.nan

    def gradient(self, parameters: Tensors) -> Tensors:
        return {name: np.full(array.shape, np.nan) for name, array in parameters.items()}


def test_a_model_that_diverged_is_worse_than_any(make: Callable[..., OnDisk]) -> None:
    run = make()
    for seed, worker in enumerate("abcdef"):
        run.publish(worker, run.random(seed, 1e4 if worker == "d" else 0.1))
    run.settle()
    judge = Diverged(drawn(50, 1))

    result = found(run, "exact-shapley", judge=judge)

    assert min(result.totals.values()) == result.totals["d"] < -1e8
    assert all(math.isfinite(value) for value in result.totals.values())
    assert found(run, "first-order", judge=judge).totals == dict.fromkeys("abcdef", 0.0)


def test_sampling_goes_by_its_seed(make: Callable[..., OnDisk]) -> None:
    run = make()
    go_on(run, 2)

    one, same, other = (found(run, "gtg-shapley", seed=seed).totals for seed in (3, 3, 4))

    assert one == same != other


def test_too_many_workers_for_all_coalitions_are_refused(make: Callable[..., OnDisk]) -> None:
    run = make()
    run.order(buffer_size=13)
    run.settle()
    for number in range(13):
        run.publish(f"w{number}", run.random(number, 0.1))
    run.settle()

    with pytest.raises(LineageError, match="version 1 was made by 13 workers, which have 8,192 coalitions"):
        found(run, "exact-shapley")


def test_without_kept_updates_it_is_said_what_to_set(make: Callable[..., OnDisk]) -> None:
    run = make(keep_updates=False)
    go_on(run, 1)

    with pytest.raises(LineageError, match="keep_updates"):
        found(run, "first-order")
