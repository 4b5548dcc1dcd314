"""What a simulated worker publishes: trained, spoiled if it is a bad one, in a codec, as bytes if that is wanted."""

from __future__ import annotations

from array import array
from dataclasses import replace

from broker.messages import Parameters, Update, UpdateId
from broker.wire import encode
from fedmq.simulation.aggregator import Letter
from fedmq.simulation.attackers import Attackers
from fedmq.simulation.coding import Coders
from fedmq.simulation.objectives import Objective
from fedmq.simulation.scenario import Scenario

__all__ = ["LIFE", "Author"]

#: Incarnation of all workers: none starts twice.
LIFE = "s"


class Author:
    """Makes all workers' updates.

    Args:
        scenario: what is simulated.
        objective: what is learned.
        names: of the workers, by number.
    """

    def __init__(self, scenario: Scenario, objective: Objective, names: list[str]) -> None:
        self.names = names
        self._objective = objective
        self._wire = scenario.run.wire
        self._attackers = Attackers(scenario.attack, len(names), objective.model, scenario.run.seed)
        self._coders = Coders(objective.model, names, LIFE)
        self._sequences = array("q", bytes(8 * len(names)))

    def letter(self, worker: int, base: Parameters, ordinal: int) -> Letter:
        """The update of ``worker`` from its training number ``ordinal`` from ``base``; each call makes another one."""
        work = self._objective.train(worker, base, ordinal)
        if self._attackers:
            work = replace(work, tensors=self._attackers.sent(worker, work.tensors))
        if base.plan.codec:
            work = self._coders.coded(worker, work, base, ordinal)
        sequence = self._sequences[worker]
        self._sequences[worker] = sequence + 1
        name = self.names[worker]
        update = Update(
            run=base.run,
            id=UpdateId(name, LIFE, sequence),
            base_version=base.version,
            base_epoch=base.epoch,
            mode=base.plan.mode,
            examples=work.examples,
            metrics=dict(work.metrics),
            model=work.model or base.model,
            tensors=work.tensors,
            steps=work.steps,
            effort=work.effort,
            codec=work.codec,
            seed=work.seed,
        )
        if not self._wire:
            return Letter(update, base.model.nbytes, name)
        body = encode(update)
        return Letter(body, len(body), name)

    def published(self) -> list[tuple[str, int]]:
        """Each worker, and how many updates it has made."""
        return list(zip(self.names, self._sequences, strict=True))
