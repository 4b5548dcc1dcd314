"""The buffer of the open round: what was folded, the sums of it, and which ids count in the model or here."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

from aggregator.core.fairness import Rates
from aggregator.core.ledger import Ledger, PlainLedger
from aggregator.core.rules import Rules
from aggregator.core.sketch import Sketcher, Sketches
from aggregator.core.snapshot import Entry, Folds, Snapshot
from aggregator.core.step import broken
from aggregator.strategies.base import Accumulator, begin, resume, scaled
from aggregator.strategies.rows import Spool
from broker.errors import FedmqError
from broker.messages import ModelSpec, Update

__all__ = ["Buffer"]

#: Seconds: 30 years, for workers that say nonsense.
LONGEST = 1e9


class Buffer:
    """Updates that will make the next version."""

    def __init__(
        self, snapshot: Snapshot, rules: Rules, make_ledger: Callable[[PlainLedger], Ledger], spool: Spool
    ) -> None:
        """As ``snapshot`` has it, whose accumulator is this buffer's from here on; ``spool`` keeps rows."""
        self.accumulator = resume(snapshot.accumulator, spool)
        self._spool = spool
        self.entries = list(snapshot.entries)
        # A checkpoint of 0.1 does not know under which settings its partial round was folded.
        unknown: Folds = ((len(self.entries), rules.settings),) if self.entries else ()
        self.folds = snapshot.folds or unknown
        self.ledger = make_ledger(snapshot.ledger)
        self._sketcher = Sketcher(snapshot.model)
        self.sketches = Sketches(self._sketcher, snapshot.sketches, len(self.entries))
        self.rates = Rates(snapshot.recent)

    def __len__(self) -> int:
        return len(self.entries)

    def fold(
        self,
        update: Update,
        rules: Rules,
        model: ModelSpec,
        staleness: int,
        *,
        norm: float | None = None,
        is_lent: bool,
    ) -> Entry:
        """Take ``update`` in, which counts nowhere yet; ``is_lent``: a checkpoint still reads the accumulator.

        Raises :class:`CheckpointNotWritten` if the strategy keeps updates and there is no room; nothing has changed.
        """
        if not self.entries:
            # Not before, so that it can have the memory of parameters that have been replaced meanwhile.
            self.accumulator = begin(rules.strategy, model, self._spool)
        elif is_lent:
            self.accumulator = self.accumulator.copy()
        watched = self.sketches.watch(update.tensors)
        if watched is not update.tensors:
            update = replace(update, tensors=watched)
        factor = self.rates.factor(update.id.worker, rules.fairness)
        try:
            weight = scaled(rules.strategy, factor).fold(self.accumulator, update, staleness)
        except (FedmqError, MemoryError):
            raise
        except Exception as error:
            raise broken(rules.strategy, error) from error
        self.rates.add(update.id.worker, rules.fairness)
        self.sketches.add()
        self.ledger.add(update.id)
        loss = update.metrics.get("loss", math.nan)
        entry = Entry(
            id=update.id,
            base_version=update.base_version,
            staleness=staleness,
            weight=weight,
            examples=update.examples,
            loss=loss if math.isfinite(loss) else None,
            steps=update.steps,
            seconds=round(update.seconds, 4) if 0 <= update.seconds < LONGEST else 0.0,
            factor=factor,
            norm=norm if norm is not None and math.isfinite(norm) else None,
        )
        self.entries.append(entry)
        if self.folds and self.folds[-1][1] == rules.settings:
            self.folds = (*self.folds[:-1], (self.folds[-1][0] + 1, rules.settings))
        else:
            self.folds = (*self.folds, (1, rules.settings))
        return entry

    def take(self, *, is_lent: bool) -> tuple[Accumulator, list[Entry], Folds, Sketches]:
        """Empty the buffer, and what was in it, to be used up; ``is_lent`` as above."""
        accumulator = self.accumulator.copy() if is_lent else self.accumulator
        taken = accumulator, self.entries, self.folds, self.sketches
        self.accumulator, self.entries, self.folds = Accumulator(), [], ()
        self.sketches = Sketches(self._sketcher)
        return taken
