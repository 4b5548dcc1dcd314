"""What each worker brought to a run: from its kept updates, by the loss on data that nobody trained on.

Three answers. All are gains of utility, which is minus the held-out loss: positive is good.

- **first order**: for each version, minus the gradient of the loss times the update, weighted as it went in; one
  gradient a version. A run's add up to about what the loss fell.
- **leave-one-out**: the run's utility less that of the run rebuilt without the worker; what only it had. Workers with
  the same data bring nothing by this measure, as each can do without the other.
- **Shapley**: the mean over all orders in which workers might have joined a round of what each then added; summed up
  over rounds. A coalition's model is what the round would have made of its updates alone (no training again), from
  the version that there was. By GTG-Shapley (arXiv 2109.02053), or exactly by all coalitions.

Who calculates losses is told nothing of all that, and this knows nothing of tasks or torch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np

from aggregator.checkpoint import CheckpointStore
from aggregator.core.snapshot import Entry
from aggregator.lineage import Lineage, Replay
from aggregator.replay import Fetch, Link, Rebuild
from aggregator.shapley import MOST_EXACT, Coalition, exact, guided
from aggregator.spool import DiskSpool
from broker.errors import LineageError
from broker.messages import Array, Mode, TensorRole, Tensors, Update, Values, whole

__all__ = ["METHODS", "Contributions", "Judge", "Kept", "Method"]

#: A loss that is no number, of a model that diverged, counts as this: worse than any.
WORST = 1e9
#: Strategies whose aggregate is the sum of what each update brings.
ADDING = frozenset({"mean", "fednova"})
#: Workers of a round of which each is left out once to value an update.
MOST_WITHOUT = 50
#: Models that leaving workers out holds at the same time.
TOGETHER = 8


class Judge(Protocol):
    """Who has the held-out data."""

    def loss(self, parameters: Tensors) -> float:
        """The mean loss of a model."""

    def gradient(self, parameters: Tensors) -> Tensors:
        """Its gradient, by the names of what trains, in their shapes; the caller's own."""


@dataclass(frozen=True, slots=True)
class Kept:
    """A run whose updates were kept."""

    lineage: Lineage
    store: CheckpointStore
    workers: frozenset[str]
    """All whose updates are in the version in question."""
    since: int = 1
    """The first version that is looked at, by methods that go by versions."""


@dataclass(slots=True)
class Contributions:
    """What workers brought, from one version to another."""

    base_version: int
    version: int
    before: float
    """Held-out loss of the first."""
    after: float
    """Of the last."""
    totals: dict[str, float]
    """By worker, over all versions."""
    by_version: dict[int, dict[str, float]] = field(default_factory=dict)
    """Of each version, by worker, if the method goes by versions."""
    losses: int = 0
    """How often a loss was calculated."""
    stuck: int = 0
    """Updates of a round that was open when updates began to be kept: they are in every model."""


#: Told how many of how many steps are done.
Report = Callable[[int, int], None]
Method = Callable[[Kept, int, Judge, int, Report], Contributions]


class Round:
    """One version in the making: what it would be, were some workers not there. Holds its updates."""

    def __init__(self, state: Rebuild, link: Link, fetch: Fetch, spool: DiskSpool) -> None:
        self.link = link
        self.state = state
        """Where it starts from."""
        self.entries = link.record.updates or link.record.dropped
        self.workers = sorted({entry.id.worker for entry in self.entries} - link.without)
        self._fetch, self._spool = fetch, spool
        self._updates: dict[int, Update] = {}

    def of(self, coalition: Coalition) -> Rebuild:
        """The state after it, had only ``coalition`` taken part. Raises :class:`LineageError`."""
        state = self._opened(frozenset(self.workers) - coalition)
        for index in range(len(self.entries)):
            if state.wants(index):
                state.fold(index, self._update(index))
        state.close()
        self._spool.sweep(frozenset)
        return state

    def folded(self) -> list[tuple[Entry, Update]]:
        """The updates that count in the version, but for those that were in the base."""
        state = self._opened(frozenset())
        return [(entry, self._update(index)) for index, entry in enumerate(self.entries) if state.wants(index)]

    def stuck(self) -> int:
        """Updates that were in the base."""
        state = self._opened(frozenset())
        counting = [entry.id.worker not in self.link.without for entry in self.link.record.updates]
        return sum(counts and not state.wants(index) for index, counts in enumerate(counting))

    def _opened(self, absent: frozenset[str]) -> Rebuild:
        state = self.state.branch(absent)
        state.open(self.link, self._spool)
        return state

    def _update(self, index: int) -> Update:
        if index not in self._updates:
            self._updates[index] = self._fetch(self.entries[index], self.link.record.epoch)
        return self._updates[index]


class _Counted:
    """A judge whose losses are numbers, and are counted."""

    def __init__(self, judge: Judge) -> None:
        self.judge = judge
        self._known: dict[str, float] = {}

    def utility(self, state: Rebuild) -> float:
        """Minus the loss. What is one model comes up often: a version is where the next round starts."""
        if state.digest not in self._known:
            loss = self.judge.loss(state.parameters)
            self._known[state.digest] = -loss if math.isfinite(loss) else -WORST
        return self._known[state.digest]

    @property
    def losses(self) -> int:
        """How often a loss was calculated."""
        return len(self._known)


# ------------------------------------------------------------------------------------------ round by round


def first_order(kept: Kept, version: int, judge: Judge, seed: int, report: Report) -> Contributions:
    """Minus the gradient of the loss times what an update moved.

    The gradient is the mean of those before and after the version, so that the sum over a round is what the loss
    fell, but for terms of third order (the trapezoidal rule); with the one before alone they are of second. Where the
    step is gradient descent along a mean, an update moves its direction times the weight with which it went in
    (:func:`_by_parts`); other optimisers and rules give no update a part of its own, and it is told by what the round
    would have been with it alone and without it (:func:`_by_marginals`). Statistics, like those of batch norm, are
    not seen.
    """
    del seed
    last: list[tuple[str, Tensors]] = []

    def gradient(state: Rebuild) -> Tensors:
        if not last or last[0][0] != state.digest:
            found = judge.gradient(state.parameters)
            finite = {name: np.nan_to_num(array, posinf=0.0, neginf=0.0) for name, array in found.items()}
            last[:] = [(state.digest, finite)]
        return last[0][1]

    def of_round(round_: Round, after: Rebuild, counted: _Counted) -> dict[str, float]:
        del counted
        before, later = gradient(round_.state), gradient(after)
        value = _by_parts if _is_sum(round_) else _by_marginals
        return value(round_, after, {name: (before[name] + later[name]) / 2 for name in before})

    return _by_rounds(kept, version, judge, report, of_round)


def gtg_shapley(kept: Kept, version: int, judge: Judge, seed: int, report: Report) -> Contributions:
    """GTG-Shapley (arXiv 2109.02053), see :func:`aggregator.shapley.guided`; rounds are drawn by ``seed``."""

    def of_round(round_: Round, after: Rebuild, counted: _Counted) -> dict[str, float]:
        del after
        source = np.random.default_rng([seed, round_.link.record.version])
        return guided(round_.workers, lambda coalition: counted.utility(round_.of(coalition)), source)

    return _by_rounds(kept, version, judge, report, of_round)


def exact_shapley(kept: Kept, version: int, judge: Judge, seed: int, report: Report) -> Contributions:
    """By all coalitions of each round. Raises :class:`LineageError` if one has too many workers."""
    del seed

    def of_round(round_: Round, after: Rebuild, counted: _Counted) -> dict[str, float]:
        del after
        if len(round_.workers) > MOST_EXACT:
            raise LineageError(
                f"version {round_.link.record.version} was made by {len(round_.workers)} workers, which have "
                f"{2 ** len(round_.workers):,} coalitions: exactly for {MOST_EXACT} at most, so take gtg-shapley"
            )
        return exact(round_.workers, lambda coalition: counted.utility(round_.of(coalition)))

    return _by_rounds(kept, version, judge, report, of_round)


def _by_rounds(
    kept: Kept,
    version: int,
    judge: Judge,
    report: Report,
    value: Callable[[Round, Rebuild, _Counted], dict[str, float]],
) -> Contributions:
    """Go along all versions, give each round and the state after it to ``value``, and sum up what it says."""
    counted = _Counted(judge)
    replay = Replay(kept.lineage, kept.store, kept.workers, apart=())
    total = replay.plan(version)
    state = replay.original
    before = -counted.utility(state)
    result = Contributions(replay.base_version, version, before, before, dict.fromkeys(sorted(kept.workers), 0.0))
    # For strategies that need all updates of a round; the run's folder is only read here.
    with tempfile.TemporaryDirectory(prefix="fedmq-contribution-") as scratch, closing(kept.lineage.kept):
        spool = DiskSpool(Path(scratch), 0)
        for done, link in enumerate(replay.links(), 1):
            round_ = Round(state, link, kept.lineage.fetch, spool)
            after = round_.of(frozenset(round_.workers))
            if not link.without:
                after.check(link.record)
            result.stuck += round_.stuck()
            if round_.workers and link.record.version >= kept.since:
                found = result.by_version[link.record.version] = value(round_, after, counted)
                for worker, gain in found.items():
                    result.totals[worker] += gain
            state = after
            report(done, total)
    result.after = -counted.utility(state)
    result.losses = counted.losses
    return result


def _is_sum(round_: Round) -> bool:
    """Whether the step is the sum of what each update brings, but for its scale."""
    settings = round_.link.record.settings
    return settings.get("strategy") in ADDING and settings.get("optimizer") == "sgd"


def _by_parts(round_: Round, after: Rebuild, gradient: Tensors) -> dict[str, float]:
    """Of a step that is a sum: minus ``gradient`` times each update, all in proportion to the step that was made."""
    folded = round_.folded()
    start, model = round_.state.parameters, after.model
    settings = round_.link.record.settings
    mode, per_step = Mode(str(settings.get("mode", Mode.DELTA.value))), settings.get("strategy") == "fednova"
    names = [tensor.name for tensor in model.tensors if tensor.role is TensorRole.PARAMETER]
    gains = [0.0] * len(folded)
    moved = squares = 0.0
    for name in names:
        slope = gradient[name].reshape(-1).astype(np.float64)
        origin = start[name].reshape(-1).astype(np.float64)
        total = np.zeros(slope.size)
        for index, (entry, update) in enumerate(folded):
            weight = entry.weight / update.effort if per_step else entry.weight
            step = weight * _direction(update.tensors[name], origin, mode)
            gains[index] -= float(slope @ step)
            total += step
        squares += float(total @ total)
        change = after.parameters[name].reshape(-1).astype(np.float64) - origin
        moved += float(change @ change)
    scale = math.sqrt(moved / squares) if squares else 0.0
    found = dict.fromkeys(round_.workers, 0.0)
    for (entry, _), gain in zip(folded, gains, strict=True):
        found[entry.id.worker] += scale * gain
    return found


def _by_marginals(round_: Round, after: Rebuild, gradient: Tensors) -> dict[str, float]:
    """Of any other step: about Shapley's value of what each worker's updates move along minus ``gradient``.

    That is the mean over s of what a worker adds to s others. For s = 0 it is the step from its updates alone, for
    all others the step that was made less that without it; those between are taken to fall as a + b / (s + 1), as
    they do for a mean, to which each further update adds less. What is then missing to the step that was made, or too
    much, is the same for all. Beyond :data:`MOST_WITHOUT` workers only the first is calculated: the rounds without
    each of many take too long, and differ little.
    """
    workers, start = round_.workers, round_.state.parameters
    count = len(workers)

    def moved(state: Rebuild) -> float:
        return -math.fsum(
            float(((state.parameters[name].astype(np.float64) - start[name]) * slope).sum())
            for name, slope in gradient.items()
        )

    all_ = moved(after)
    early = (math.fsum(1 / size for size in range(1, count + 1)) - 1) / (count - 1) if count > 1 else 1.0
    found = {worker: early * moved(round_.of(frozenset({worker}))) for worker in workers}
    if 1 < count <= MOST_WITHOUT:
        for worker in workers:
            found[worker] += (1 - early) * (all_ - moved(round_.of(frozenset(workers) - {worker})))
    missing = (all_ - math.fsum(found.values())) / count
    return {worker: gain + missing for worker, gain in found.items()}


def _direction(values: Values, origin: Array, mode: Mode) -> Array:
    """Where an update's tensor points to from ``origin``, flat, in float64."""
    flat = whole(values).reshape(-1).astype(np.float64)
    if mode is Mode.PARAMETERS:
        return flat - origin
    return -flat if mode is Mode.GRADIENT else flat


# ------------------------------------------------------------------------------------------- the whole run


def leave_one_out(kept: Kept, version: int, judge: Judge, seed: int, report: Report) -> Contributions:
    """For each worker: the run's utility, less that of the run without it. Updates are read once for eight of them."""
    del seed
    counted = _Counted(judge)
    workers = sorted(kept.workers)
    groups = [workers[start : start + TOGETHER] for start in range(0, len(workers), TOGETHER)] or [[]]
    result: Contributions | None = None
    for number, group in enumerate(groups):
        replay = Replay(kept.lineage, kept.store, frozenset(group), apart=[frozenset({worker}) for worker in group])
        total = replay.plan(version)
        if result is None:
            before = -counted.utility(replay.original)
            result = Contributions(replay.base_version, version, before, before, {})
        for done, _ in enumerate(replay.run(), 1):
            report(number * total + done, len(groups) * total)
        if not number:
            result.after = -counted.utility(replay.original)
        for worker, rebuild in zip(group, replay.others, strict=True):
            result.totals[worker] = -result.after - counted.utility(rebuild)
            result.stuck += sum(rebuild.stuck.values())
    assert result is not None  # noqa: S101 - there is one group at least
    result.losses = counted.losses
    return result


#: By the name of ``fedmq contribution --method``.
METHODS: Mapping[str, Method] = {
    "first-order": first_order,
    "leave-one-out": leave_one_out,
    "gtg-shapley": gtg_shapley,
    "exact-shapley": exact_shapley,
}
