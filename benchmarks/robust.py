"""Robust rules against attacks: one aggregation, and a training on handwritten digits.

    python benchmarks/robust.py single          # error of one aggregation, synthetic updates
    python benchmarks/robust.py training        # accuracy after training, digits over unlike workers

``single``: honest updates are mu + N(0, 1) in 2000 dimensions with ||mu|| = sqrt(2000) / 2; a cell is the distance of
the aggregate from the honest mean, over sqrt(2000), mean of the seeds.

``training``: softmax regression on scikit-learn's digits. The examples are spread over the workers by a Dirichlet
distribution over labels, so that honest workers differ. In each round every worker sends the exponential average of its
gradients (``--momentum``; 0 is its gradient), the bad ones what the attack makes of that; the server steps along what
the rule gives. A cell is the accuracy on held-out digits in per cent, mean of the seeds. No network and no wire here:
the rules are those of the aggregator, and the attacks those of the simulator.

Rows that begin with ``screen`` leave out first what the aggregator would reject with ``norm_factor = 3``.

Figures: docs/robustness.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from aggregator.core.norms import NormWindow
from aggregator.core.screen import NormLimits
from aggregator.strategies.rows import MemoryRows
from aggregator.strategies.rules import RULES, Chain, Occasion, RuleSettings, pre_aggregations_of
from broker.messages import Array
from fedmq.simulation.attacks import Scene, attack_of, flip_labels, flips_labels
from worker_client.tasks.partition import dirichlet

RULE_NAMES = (
    "mean",
    "norm-clipping",
    "median",
    "trimmed-mean",
    "krum",
    "multi-krum",
    "geometric-median",
    "centered-clipping",
    "nnm median",
    "nnm trimmed-mean",
    "bucketing:2 geometric-median",
    "bucketing:2 centered-clipping",
    "screen bucketing:2 centered-clipping",
    "clip,bucketing:2 centered-clipping",
)
SINGLE = ("none", "scaled-flip:1", "scaled-flip:10", "gaussian:30", "zero", "ipm:0.1", "ipm:1.5", "alie", "alie:1.5")
TRAINING = (
    "none",
    "sign-flip",
    "scaled-flip:10",
    "gaussian:30",
    "ipm:0.1",
    "ipm:1.5",
    "alie",
    "alie:1.5",
    "mimic",
    "label-flip",
)
DIMENSIONS = 2000
CLASSES = 10
LIMITS = NormLimits(factor=3.0)


@dataclass(frozen=True)
class Setting:
    """One table."""

    workers: int
    bad: int
    seeds: int
    rounds: int = 0
    rate: float = 0.0
    momentum: float = 0.0
    alpha: float = 0.0
    batch: int = 0


def chain_of(name: str, bad: int) -> Callable[[MemoryRows, Occasion], Array]:
    """The rule of a row, behind its pre-aggregation if it has one."""
    if name == "mean":
        return lambda rows, _: np.asarray(rows.block(0, rows.size).mean(axis=0))
    before, _, last = name.removeprefix("screen ").rpartition(" ")
    settings = RuleSettings(byzantine=bad)
    return Chain(pre_aggregations_of(before, settings), RULES[last](settings))


def rows_of(values: Array) -> MemoryRows:
    rows = MemoryRows(values.shape[1], values.dtype)
    for index, row in enumerate(values):
        rows.append([row], 1.0, str(index))
    return rows


def screened(values: Array, norms: NormWindow, order: Iterable[int]) -> Array:
    """Those rows that are not unusually long, in the light of those that came before; they come in ``order``."""
    taken = []
    for worker in order:
        norm = float(np.linalg.norm(values[worker]))
        if LIMITS.refusal(norm, norms.median) is None:
            taken.append(values[worker])
        norms.add(str(worker), norm)
    return np.stack(taken)


def single(name: str, attack: str, setting: Setting) -> float:
    """One cell: the mean error."""
    rule = chain_of(name, setting.bad)
    errors = []
    for seed in range(setting.seeds):
        generator = np.random.default_rng(seed)
        mu = generator.normal(size=DIMENSIONS)
        mu *= 0.5 * np.sqrt(DIMENSIONS) / np.linalg.norm(mu)
        values = mu + generator.normal(size=(setting.workers, DIMENSIONS))
        honest = values if attack == "none" else values[setting.bad :]
        for own in values[: setting.bad] if attack != "none" else ():
            own[...] = attack_of(attack)(Scene(own, honest, setting.bad, generator))
        if name.startswith("screen"):
            usual = {str(worker): (float(np.linalg.norm(row)),) for worker, row in enumerate(honest)}
            values = screened(values, NormWindow(usual), range(len(values)))
        result = rule(rows_of(values), Occasion(seed))
        errors.append(np.linalg.norm(result - honest.mean(axis=0)) / np.sqrt(DIMENSIONS))
    return float(np.mean(errors))


class Digits:
    """The data of all workers, and what they calculate with it."""

    def __init__(self, setting: Setting, seed: int) -> None:
        from sklearn.datasets import load_digits  # noqa: PLC0415 (slow, and only this table needs it)

        pixels, labels = load_digits(return_X_y=True)
        order = np.random.default_rng(seed).permutation(len(labels))
        pixels = np.hstack([pixels[order] / 16.0, np.ones((len(labels), 1))])
        labels = labels[order]
        held_out = len(labels) // 5
        self.test = pixels[:held_out], labels[:held_out]
        self.pixels, self.labels = pixels[held_out:], labels[held_out:]
        self.parts = dirichlet(self.labels, setting.workers, alpha=setting.alpha, seed=seed)
        self._batch = setting.batch
        self._generator = np.random.default_rng(seed + 1)

    @property
    def size(self) -> int:
        """Parameters: a weight for each pixel and class, and a bias."""
        return int(self.pixels.shape[1]) * CLASSES

    def gradients(self, parameters: Array, flipped: int) -> Array:
        """Of every worker's mean loss on a batch, (workers, size); the first ``flipped`` have their labels flipped."""
        chosen = np.stack([self._generator.choice(part, self._batch) for part in self.parts])
        inputs, labels = self.pixels[chosen], self.labels[chosen]
        labels[:flipped] = flip_labels(labels[:flipped], CLASSES)
        scores = inputs @ parameters.reshape(-1, CLASSES)
        scores = np.exp(scores - scores.max(axis=2, keepdims=True))
        wrong = scores / scores.sum(axis=2, keepdims=True) - np.eye(CLASSES)[labels]
        per_worker = np.einsum("wbi,wbc->wic", inputs, wrong) / self._batch
        return np.asarray(per_worker.reshape(len(self.parts), -1))

    def accuracy(self, parameters: Array) -> float:
        """On the held-out digits."""
        inputs, labels = self.test
        return float(((inputs @ parameters.reshape(-1, CLASSES)).argmax(axis=1) == labels).mean())


def train(name: str, attack: str, setting: Setting, seed: int) -> float:
    """The accuracy at the end."""
    rule, sent = chain_of(name, setting.bad), attack_of(attack)
    data = Digits(setting, seed)
    generator = np.random.default_rng(seed)
    flipped = setting.bad if flips_labels(attack) else 0
    parameters, momenta = np.zeros(data.size), np.zeros((setting.workers, data.size))
    previous: Array | None = None
    norms = NormWindow()
    for version in range(setting.rounds):
        gradients = data.gradients(parameters, flipped)
        momenta = setting.momentum * momenta + (1 - setting.momentum) * gradients
        values = momenta.copy()
        if attack != "none":
            for own in values[: setting.bad]:
                own[...] = sent(Scene(own, values[setting.bad :], setting.bad, generator))
        if name.startswith("screen"):
            values = screened(values, norms, generator.permutation(len(values)))
        previous = rule(rows_of(values), Occasion(seed, version, previous))
        parameters = parameters - setting.rate * previous
        if not np.isfinite(parameters).all():
            return 0.0
    return data.accuracy(parameters)


def training(name: str, attack: str, setting: Setting) -> float:
    """One cell: the mean accuracy, in per cent."""
    return 100 * float(np.mean([train(name, attack, setting, seed) for seed in range(setting.seeds)]))


def say(
    cell: Callable[[str, str, Setting], float],
    names: Sequence[str],
    attacks: Sequence[str],
    form: str,
    setting: Setting,
) -> None:
    """Print the table, a row as soon as it is there."""
    print("| rule |", " | ".join(attacks), "| worst |")
    print("| --- |", " | ".join("---" for _ in attacks), "| --- |")
    for name in names:
        values = [cell(name, attack, setting) for attack in attacks]
        worst = min(values) if form == ".1f" else max(values)
        print(f"| {name} |", " | ".join(f"{value:{form}}" for value in [*values, worst]), "|", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", nargs="?", choices=["single", "training", "both"], default="both")
    parser.add_argument("--rules", nargs="+", default=RULE_NAMES, help="rows, like 'nnm median'")
    parser.add_argument("--workers", type=int, help="25 and 20")
    parser.add_argument("--bad", type=int, help="5 and 4")
    parser.add_argument("--seeds", type=int, help="10 and 2")
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--rate", type=float, default=0.5)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--alpha", type=float, default=1.0, help="of the Dirichlet distribution; small: unlike workers")
    parser.add_argument("--batch", type=int, default=32)
    given = parser.parse_args()
    if given.table != "training":
        setting = Setting(given.workers or 25, given.bad or 5, given.seeds or 10)
        print(f"{setting.workers} workers, {setting.bad} bad, {setting.seeds} seeds\n")
        say(single, given.rules, SINGLE, ".3f", setting)
    if given.table == "single":
        return
    setting = Setting(
        given.workers or 20,
        given.bad or 4,
        given.seeds or 2,
        given.rounds,
        given.rate,
        given.momentum,
        given.alpha,
        given.batch,
    )
    print(f"\n{setting}\n")
    say(training, given.rules, TRAINING, ".1f", setting)


if __name__ == "__main__":
    main()
