"""Versions rebuilt from the history and the kept updates, bit for bit: the round machine's arithmetic once more.

Everything that decides the numbers stands in a version's line: the updates in the order in which they were folded,
their staleness, the settings, and whether the optimiser began anew. The same functions go over them again. With
workers left out, the staleness of the other updates and the numbers of the versions stand as they were; a round
that has no update left makes no step.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, replace

import numpy as np
from pydantic import ValidationError

from aggregator.core.sketch import Sketcher, Sketches
from aggregator.core.snapshot import Entry, Snapshot, VersionRecord
from aggregator.core.step import aggregate_of, next_parameters
from aggregator.optimizers.remembering import Remembering
from aggregator.recipe import Recipe
from aggregator.schedules import factor_at, schedule_of
from aggregator.strategies import Accumulator, stepping, strategy_of
from aggregator.strategies.base import begin, resume, scaled
from aggregator.strategies.rows import MemorySpool, Spool
from aggregator.strategies.rules.base import Occasion
from broker.errors import ConfigError, LineageError, StrategyError, first_problem
from broker.messages import Mode, Scalar, Tensors, Update, parameters_digest

__all__ = ["Fetch", "Link", "Rebuild", "distance", "needed", "rebuild"]

#: Gives the update of an entry that was folded under an epoch, or under an earlier one.
Fetch = Callable[[Entry, int], Update]

#: Elements that are widened together.
PIECE = 1 << 20

#: By how much two calculations of one cosine may differ: sums may be rounded in another order elsewhere.
COSINE_TOLERANCE = 1e-4


@dataclass(frozen=True, slots=True)
class Link:
    """One version in the lineage of another."""

    record: VersionRecord
    without: frozenset[str] = frozenset()
    """Workers that were left out when a version further up was rebuilt from this one."""


class Rebuild:
    """The state of a run at one version, and the way from there to the next."""

    def __init__(self, base: Snapshot, leave_out: frozenset[str] = frozenset()) -> None:
        """Begin with the state that ``base`` holds, a partial round included; it is not written into.

        Args:
            base: where to begin.
            leave_out: workers whose updates are left out.
        """
        self.model = base.model
        self.version = base.version
        self.parameters = base.parameters
        self.optimizer = base.optimizer
        self.left_out: Counter[int] = Counter()
        """How many updates of ``leave_out`` were left out, by the version that they were in."""
        self.stuck: Counter[int] = Counter()
        """How many should have been, but had gone into the base's partial round."""
        self.leave_out = leave_out
        self._digest: str | None = base.digest
        self._partial = (tuple(entry.id for entry in base.entries), base.accumulator, base.sketches)
        self._sketcher = Sketcher(self.model)
        self._marked: tuple[Entry, ...] = ()

    def branch(self, leave_out: frozenset[str]) -> Rebuild:
        """The same state, to go on with these workers left out; this one stays where it is."""
        other = copy(self)  # nothing is written into that both have
        other.left_out, other.stuck, other.leave_out = Counter(), Counter(), leave_out
        return other

    @property
    def digest(self) -> str:
        """Of the parameters."""
        if self._digest is None:
            self._digest = parameters_digest(self.parameters)
        return self._digest

    def open(self, link: Link, spool: Spool | None = None) -> None:
        """Begin what made ``link``'s version: a round, or parameters that were there before.

        ``spool`` keeps the round's updates if its strategy needs them all, memory by default.
        """
        spool = spool or MemorySpool()
        record, absent = link.record, self.leave_out | link.without
        self._record, self._is_altered = record, bool(absent)
        self._entries = _entries(record, absent)
        self._wanted = [entry.id.worker not in absent for entry in self._entries]
        self._accumulator, self._sketches = Accumulator(), Sketches(self._sketcher)
        self._marked = ()
        if not self._entries:
            return
        folds = record.folds or ((len(self._entries), record.settings),)
        self._strategies = [one for n, settings in folds for one in [strategy_of(_recipe(record, settings))] * n]
        if len(self._strategies) != len(self._entries):
            raise LineageError(f"version {record.version}: its line tells of more or fewer updates than were folded")
        self._accumulator = begin(self._strategies[0], self.model, spool)
        done = self._go_on_with_partial(spool)
        self.left_out[record.version] += sum(entry.id.worker in self.leave_out for entry in self._entries[done:])

    def wants(self, index: int) -> bool:
        """Whether the update of the version's entry at ``index`` is to be folded."""
        return index < len(self._wanted) and self._wanted[index]

    def fold(self, index: int, update: Update) -> None:
        """Add the update of the version's entry at ``index``; in their order.

        Raises :class:`LineageError` if it is not the one that was folded, or went in with another weight.
        """
        entry, version = self._entries[index], self._record.version
        if (update.id, update.base_version, update.examples) != (entry.id, entry.base_version, entry.examples):
            raise LineageError(f"version {version}: the kept update {update.id} is not the one that its line tells of")
        if update.model != self.model:
            raise LineageError(f"version {version}: the kept update {update.id} is of another model")
        if not self._is_altered:  # else there is nothing that its cosine could be compared with
            update = replace(update, tensors=self._sketches.watch(update.tensors))
        weight = scaled(self._strategies[index], entry.factor).fold(self._accumulator, update, entry.staleness)
        if not self._is_altered:
            self._sketches.add()
        if weight != entry.weight:
            raise LineageError(
                f"version {version}: update {entry.id} went in with weight {entry.weight!r}, and the settings in its "
                f"line make that {weight!r}: the line was altered, or this release or machine calculates otherwise"
            )

    def close(self) -> None:
        """The version is there: after a step, if it had updates."""
        record = self._record
        self.version = record.version
        accumulator, self._accumulator = self._accumulator, Accumulator()
        if not accumulator.count:
            return
        recipe = _recipe(record, record.settings)
        optimizer, schedule = stepping(recipe), schedule_of(recipe)
        fresh = optimizer.init()
        begins_anew = record.step == 0 or self.optimizer.slots.keys() != fresh.slots.keys()
        state = fresh if begins_anew else self.optimizer
        previous = Remembering.last(state, self.model, recipe.mode)
        accumulator.occasion = Occasion(recipe.seed, record.version - 1, previous)
        try:
            aggregate = aggregate_of(strategy_of(recipe), accumulator, self.model)
            if not self._is_altered:
                origin = self.parameters if recipe.mode is Mode.PARAMETERS else None
                self._marked = self._sketches.marked(self._entries, aggregate, origin)
            self.parameters, self.optimizer = next_parameters(
                self.model,
                self.parameters,
                aggregate,
                mode=recipe.mode,
                optimizer=optimizer.scaled(factor_at(schedule, record.version - 1)),
                state=state,
                pull=accumulator.pull,
            )
        except StrategyError as error:
            if not self._is_altered:
                raise LineageError(f"version {record.version} came out otherwise: {error}") from None
        else:
            self._digest = None

    def check(self, record: VersionRecord) -> None:
        """Raise :class:`LineageError` if this is not what ``record`` says of its version."""
        if self.digest != record.after:
            raise LineageError(
                f"version {record.version} came out otherwise: its line has digest {record.after}, the rebuild has "
                f"{self.digest}. What could be checked before it agrees, so this line or a kept update of this round "
                "was altered, or this release or machine calculates otherwise"
            )
        for told, found in zip(record.updates, self._marked, strict=False):
            if told.cosine is None or found.cosine is None:  # as in lines of 0.1, and a base's partial round of then
                continue
            if abs(told.cosine - found.cosine) > COSINE_TOLERANCE:
                raise LineageError(
                    f"version {record.version}: its line says that update {told.id} agrees with the others by "
                    f"{told.cosine}, and the rebuild finds {found.cosine}: the line was altered"
                )

    def _go_on_with_partial(self, spool: Spool) -> int:
        """Begin with the base's partial round, if it became this one; the number of updates in it."""
        (ids, accumulator, sketches), self._partial = self._partial, ((), Accumulator(), ())
        done = len(ids)
        if not done or tuple(entry.id for entry in self._entries[:done]) != ids:
            return 0
        self._accumulator = resume(accumulator.copy(), spool)
        self._sketches = Sketches(self._sketcher, sketches, done)
        self._wanted[:done] = [False] * done
        self.stuck[self._record.version] += sum(update_id.worker in self.leave_out for update_id in ids)
        return done


def rebuild(
    links: Iterable[Link], fetch: Fetch, original: Rebuild, *others: Rebuild, spool: Spool | None = None
) -> Iterator[VersionRecord]:
    """Move all rebuilds along ``links``, and give each version's record when they have reached it.

    Each update is read once, and one at a time. ``original`` leaves nobody out; it is checked against the digests
    that the history has. ``spool`` keeps the updates of a round whose strategy needs them all, memory by default; it
    must be able to go on from those of the partial round that a rebuild begins with.

    Raises :class:`LineageError` at the first difference.
    """
    rebuilds = (original, *others)
    for link in links:
        for one in rebuilds:
            one.open(link, spool)
        for index, entry in enumerate(link.record.updates or link.record.dropped):
            wanting = [one for one in rebuilds if one.wants(index)]
            if wanting:
                update = fetch(entry, link.record.epoch)
                for one in wanting:
                    one.fold(index, update)
        for one in rebuilds:
            one.close()
        if not link.without:
            original.check(link.record)
        yield link.record


def needed(link: Link, leave_out: frozenset[str] = frozenset()) -> list[Entry]:
    """Updates without which ``link``'s version cannot be rebuilt, as it was and with ``leave_out`` left out."""
    record = link.record
    absences = [absent for absent in (link.without, link.without | leave_out) if _entries(record, absent)]
    entries = record.updates or record.dropped
    return [entry for entry in entries if any(entry.id.worker not in absent for absent in absences)]


def distance(one: Tensors, other: Tensors) -> float:
    """The Euclidean distance of two models' tensors, all elements together."""
    squares = 0.0
    for name, array in one.items():
        a, b = array.reshape(-1), other[name].reshape(-1)
        for start in range(0, a.size, PIECE):
            piece = a[start : start + PIECE].astype(np.float64) - b[start : start + PIECE].astype(np.float64)
            squares += float(np.dot(piece, piece))
    return math.sqrt(squares)


def _entries(record: VersionRecord, absent: frozenset[str]) -> tuple[Entry, ...]:
    """The updates of a round.

    None if it was no round, or one whose step was not finite: it was left out, but for those who rebuild it
    without the worker that may have spoiled it.
    """
    is_spoiled = record.source is not None and bool(record.settings)
    if is_spoiled and any(entry.id.worker in absent for entry in record.dropped):
        return record.dropped
    return record.updates


def _recipe(record: VersionRecord, settings: Mapping[str, Scalar]) -> Recipe:
    """What made the version, if this release knows all of it."""
    try:
        recipe = Recipe.of(settings)
        stepping(recipe)
        schedule_of(recipe)
    except ValidationError as error:
        where, what = first_problem(error)
        raise LineageError(
            f"version {record.version}: its line does not say how it was made (settings.{where}: {what}); "
            "fedmq 0.1 did not note that"
        ) from None
    except ConfigError as error:
        raise LineageError(
            f"version {record.version}: {error}: use the release that made the run, or a newer one, with the packages "
            "that it used; what was named by its path has to be named in the configuration"
        ) from None
    return recipe
