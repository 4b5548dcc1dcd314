"""The versions of a run: the newest one, the newest that is durable, and the records of those in between."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from aggregator.core import effects as do
from aggregator.core.commits import Flight
from aggregator.core.rules import Rules
from aggregator.core.sketch import Sketches
from aggregator.core.snapshot import Entry, Folds, Snapshot, VersionRecord
from aggregator.core.step import aggregate_of, next_parameters
from aggregator.optimizers import Optimizer, OptimizerState
from aggregator.optimizers.remembering import Remembering
from aggregator.strategies.base import Accumulator
from aggregator.strategies.rules.base import Occasion
from broker.errors import StrategyBroken, StrategyError
from broker.messages import Mode, Plan, parameters_digest

__all__ = ["Versions"]

#: So many rounds in a row without a finite step are no accident of one update.
MAX_SPOILED = 5


class Versions:
    """What the rounds of a run make. Arrays are replaced, never written into."""

    def __init__(self, snapshot: Snapshot, optimizer: Optimizer) -> None:
        """Go on from ``snapshot``, which is durable; nothing of its accumulator is kept."""
        self.model = snapshot.model
        self.epoch = snapshot.epoch
        self.newest = snapshot.version
        self.parameters = snapshot.parameters
        self.digest = snapshot.digest
        self.memory = snapshot.optimizer
        """The optimiser's."""
        self.records: list[VersionRecord] = []
        """Of the versions that no checkpoint holds yet."""
        self.durable = _without_sums(snapshot)
        self._spoiled = 0
        self.use(optimizer)

    @property
    def is_newest_durable(self) -> bool:
        """Whether nothing newer than the durable version has been made."""
        return self.durable.version == self.newest

    def use(self, optimizer: Optimizer) -> None:
        """Step with ``optimizer`` from now on. Another kind than before starts without memory.

        The old one's slots mean nothing to it.
        """
        fresh = optimizer.init()
        if self.memory.slots.keys() != fresh.slots.keys():
            self.memory = fresh

    def step(
        self,
        rules: Rules,
        accumulator: Accumulator,
        entries: Sequence[Entry],
        folds: Folds,
        sketches: Sketches,
        *,
        opened: float,
        now: float,
    ) -> str | None:
        """Make the next version of a round's ``accumulator``, which is used up. It is not durable yet.

        A step that is not finite becomes a version with the parameters of the one before: the run goes on, and
        its history tells which updates were left out.

        Returns:
            What an operator should know, if the step was not finite.

        Raises:
            StrategyError: that goes on and on.
            StrategyBroken: at once, if the strategy or the optimiser raises or gives other tensors than the model's.
        """
        before, step, updates = self.digest, self.memory.step, tuple(entries)
        problem: StrategyError | None = None
        previous = Remembering.last(self.memory, self.model, rules.mode)
        accumulator.occasion = Occasion(rules.seed, self.newest, previous)
        try:
            aggregate = aggregate_of(rules.strategy, accumulator, self.model)
            origin = self.parameters if rules.mode is Mode.PARAMETERS else None
            marked = sketches.marked(entries, aggregate, origin)
            self.parameters, self.memory = next_parameters(
                self.model,
                self.parameters,
                aggregate,
                mode=rules.mode,
                optimizer=rules.optimizer_at(self.newest),
                state=self.memory,
                pull=accumulator.pull,
            )
        except StrategyBroken:
            raise
        except StrategyError as error:
            problem = StrategyError(f"strategy {rules.settings.get('strategy', 'unnamed')}: {error}")
            self._spoiled += 1
            if self._spoiled == MAX_SPOILED:
                raise problem from error
        else:
            self._spoiled, updates = 0, marked
            self.digest = parameters_digest(self.parameters)
        self.newest += 1
        self.let_go()
        self.records.append(
            VersionRecord(
                version=self.newest,
                epoch=self.epoch,
                time=now,
                seconds=now - opened,
                updates=updates if problem is None else (),
                loss=_mean_loss(updates) if problem is None else None,
                before=before,
                after=self.digest,
                settings=rules.settings,
                source=None if problem is None else self.newest - 1,
                dropped=() if problem is None else updates,
                step=step,
                folds=() if all(settings == rules.settings for _, settings in folds) else folds,
            )
        )
        return None if problem is None else f"{problem}; the {len(updates)} updates of this round are left out"

    def land(self, flight: Flight) -> list[VersionRecord]:
        """What ``flight`` wrote is durable: the records of the versions that are so from now on."""
        self.durable = _without_sums(flight.snapshot)
        written = len(flight.snapshot.records)
        landed = self.records[:written]
        del self.records[:written]
        return landed

    def let_go(self) -> None:
        """Drop the parameters of a version that has a successor: workers have them, and the next fold takes memory."""
        if not self.is_newest_durable:
            self.durable = replace(self.durable, parameters={})

    def broadcast(self, plan: Plan) -> do.Broadcast:
        """The durable version for all workers, and what they are to do with it."""
        durable = self.durable
        return do.Broadcast(durable.epoch, durable.version, plan, durable.digest, self.model, durable.parameters)


def _without_sums(snapshot: Snapshot) -> Snapshot:
    """As much of ``snapshot`` as a broadcast needs: what else is in it would keep models' worth of memory."""
    return replace(snapshot, accumulator=Accumulator(), optimizer=OptimizerState({}), sketches=())


def _mean_loss(entries: tuple[Entry, ...]) -> float | None:
    known = [(entry.loss, entry.examples) for entry in entries if entry.loss is not None]
    total = sum(examples for _, examples in known)
    mean = math.fsum(loss * (n / total) for loss, n in known) if total else math.nan
    return mean if math.isfinite(mean) else None
