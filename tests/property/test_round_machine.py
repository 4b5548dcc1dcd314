"""Any order of updates, duplicates, crashes before any effect, lost connections, slow and failing checkpoints:
every update id is applied exactly once in the durable state, and a confirmed update is never lost.

The model counts: update ``n`` of worker ``i`` adds 1 to element ``i``, all weights are 1, and the server divides
by one. So the parameters are the number of applied updates by worker, exactly.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.ledger import Ledger
from aggregator.core.machine import RoundMachine
from aggregator.core.rounds import Buffered
from aggregator.core.rules import CommitPolicy
from aggregator.core.snapshot import Snapshot, VersionRecord
from aggregator.optimizers import Sgd
from aggregator.staleness import constant
from aggregator.strategies import Accumulator, Gather, Strategy
from aggregator.strategies.rows import GrowingRows, MemoryRows, MemorySpool, Rows
from aggregator.strategies.rules.base import Occasion
from broker.errors import CheckpointNotWritten
from broker.messages import Array, ModelSpec, Reason, Update, UpdateId, whole
from broker.transport import Token
from tests.support.builders import rules_of, snapshot_of, update_of

WORKERS = 3

#: A run that is cut again and again never gets far.
RARELY = st.sampled_from([False] * 4 + [True])


def sometimes(last: int) -> st.SearchStrategy[int | None]:
    """Before which effect to die, if at all."""
    return st.sampled_from([None] * 4 * (last + 1) + [*range(last + 1)])


@dataclass(frozen=True)
class Count:
    """A strategy whose aggregate is the plain sum, so that the model counts."""

    shares: bool
    """Whether the aggregate has the accumulator's arrays, which then become the next parameters."""

    def init(self, model: ModelSpec) -> Accumulator:
        return Accumulator({t.name: np.zeros(t.shape, np.float64) for t in model.tensors})

    def fold(self, accumulator: Accumulator, update: Update, staleness: int) -> float:
        for name, total in accumulator.tensors.items():
            np.add(total, whole(update.tensors[name]), out=total)
        accumulator.count += 1
        return 1.0

    def finish(self, accumulator: Accumulator, model: ModelSpec) -> dict[str, Array]:
        if self.shares:
            return accumulator.tensors
        result = {name: total.copy() for name, total in accumulator.tensors.items()}
        for total in accumulator.tensors.values():
            total.fill(-1e6)  # used up, as a strategy may
        return result


@dataclass(frozen=True)
class Sum:
    """The same as a rule over all updates."""

    remembers: bool = False

    def least(self) -> int:
        return 1

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        del occasion
        total: Array = rows.block(0, rows.size).sum(axis=0)
        return total


STRATEGIES: Mapping[str, Strategy] = {
    "shares": Count(shares=True),
    "copies": Count(shares=False),
    "gathers": Gather(Sum(), constant()),
}


class Tight:
    """Keeps rows in memory, which is full now and then."""

    def __init__(self) -> None:
        self.is_full = False

    def begin(self, model: ModelSpec) -> GrowingRows:
        return self._watched(MemorySpool().begin(model))

    def resume(self, rows: Rows) -> GrowingRows:
        return self._watched(MemorySpool().resume(rows))

    def _watched(self, rows: MemoryRows) -> GrowingRows:
        append = rows.append

        def sometimes(values: Iterable[Array], weight: float, worker: str) -> None:
            if self.is_full:
                raise CheckpointNotWritten("no room")
            append(values, weight, worker)

        rows.append = sometimes  # type: ignore[method-assign]
        return rows


@dataclass
class Broker:
    """A queue with acknowledgement, redelivery and prefetch."""

    prefetch: int
    waiting: deque[Update]
    unacked: dict[Token, Update]
    generation: int = 1
    tag: int = 0

    def deliver(self) -> tuple[Token, Update] | None:
        if not self.waiting or len(self.unacked) >= self.prefetch:
            return None
        self.tag += 1
        token = Token(self.generation, self.tag)
        self.unacked[token] = self.waiting.popleft()
        return token, self.unacked[token]

    def cut(self) -> int:
        lost = self.generation
        self.waiting.extendleft(reversed(self.unacked.values()))
        self.unacked.clear()
        self.generation += 1
        return lost


class Exactly(RuleBasedStateMachine):
    """The machine, a shell that can die before any effect, and a broker."""

    @initialize(
        size=st.integers(1, 4),
        count=st.integers(1, 4),
        seconds=st.sampled_from([5.0, 1e9]),
        max_staleness=st.sampled_from([1, 1000]),
        strategy=st.sampled_from(sorted(STRATEGIES)),
    )
    def begin(self, size: int, count: int, seconds: float, max_staleness: int, strategy: str) -> None:
        self.run_rules = rules_of(
            rounds=Buffered(size=size, max_staleness=max_staleness),
            strategy=STRATEGIES[strategy],
            optimizer=Sgd(1.0),
            commit=CommitPolicy(count=count, seconds=seconds),
            retry_seconds=2.0,
        )
        self.broker = Broker(prefetch=2 * count, waiting=deque(), unacked={})
        self.disk: Snapshot = snapshot_of({"n": np.zeros(WORKERS, np.float64)}, epoch=0)
        self.clock = 0.0
        self.next_seq = [0] * WORKERS
        self.published: set[UpdateId] = set()
        self.dead: set[UpdateId] = set()
        self.acked: set[UpdateId] = set()
        self.broadcast: tuple[int, int] = (0, -1)
        self.history: dict[int, VersionRecord] = {}
        self.start()

    # ----------------------------------------------------------------------------------------- the shell

    def start(self) -> None:
        self.disk = replace(self.disk, epoch=self.disk.epoch + 1)
        self.remember(self.disk.records)
        self.spool = Tight()
        self.machine = RoundMachine(self.run_rules, copy.deepcopy(self.disk), self.clock, spool=self.spool)
        self.flight: tuple[int, Snapshot, Snapshot] | None = None
        self.is_copied = False
        self.fetches: deque[Token] = deque()
        self.send(on.LinkUp(self.broker.generation))

    def send(self, event: on.Happening, die_before: int | None = None) -> None:
        effects = self.machine.handle(event, self.clock)
        self.refused = {self.broker.unacked[effect.token].id for effect in effects if isinstance(effect, do.Reject)}
        for index, effect in enumerate(effects):
            if index == die_before:
                self.crash()
                return
            self.perform(effect)

    def perform(self, effect: do.Effect) -> None:
        match effect:
            case do.Ack(token):
                update = self.broker.unacked.pop(token)
                if update.id in self.refused:
                    return  # a second copy of what goes to the dead letters
                self.acked.add(update.id)
                assert update.id in Ledger(self.disk.ledger), "acknowledged before it was durable"
            case do.Fetch(token):
                self.fetches.append(token)
            case do.Reject(token, _reason, _detail):
                update = self.broker.unacked.pop(token)
                self.dead.add(update.id)
            case do.WriteCheckpoint(commit, snapshot):
                assert self.flight is None, "two checkpoints at a time"
                self.flight = (commit, snapshot, copy.deepcopy(snapshot))
                self.is_copied = False
            case do.Broadcast(epoch, version, _plan, _digest, _model, parameters):
                assert (epoch, version) >= self.broadcast, "went back"
                assert version == self.disk.version, "broadcast what is not durable"
                np.testing.assert_array_equal(parameters["n"], self.disk.parameters["n"])
                self.broadcast = (epoch, version)
            case do.Record(do.VersionMade(record)):
                assert record.version <= self.disk.version
                self.remember((record,))

    def remember(self, records: tuple[VersionRecord, ...]) -> None:
        """As the history file does: a version that it has already is passed over."""
        for record in records:
            self.history.setdefault(record.version, record)

    def crash(self) -> None:
        self.broker.cut()
        self.start()

    # ------------------------------------------------------------------------------------------ the rules

    @rule(workers=st.lists(st.integers(0, WORKERS - 1), min_size=1, max_size=4), lag=st.integers(0, 3))
    def publish_some(self, workers: list[int], lag: int) -> None:
        for worker in workers:
            self.publish(worker, lag)

    def publish(self, worker: int, lag: int) -> None:
        one = np.zeros(WORKERS, np.float64)
        one[worker] = 1
        base = max(0, self.disk.version - lag)
        update = update_of({"n": one}, worker=f"w{worker}", seq=self.next_seq[worker], base_version=base)
        self.next_seq[worker] += 1
        self.published.add(update.id)
        self.broker.waiting.append(update)

    @precondition(lambda self: self.published)
    @rule(data=st.data())
    def publish_again(self, data: st.DataObject) -> None:
        """The confirm was lost: the worker sends the same id again."""
        update_id = data.draw(st.sampled_from(sorted(self.published)))
        one = np.zeros(WORKERS, np.float64)
        one[int(update_id.worker[1:])] = 1
        self.broker.waiting.append(update_of({"n": one}, worker=update_id.worker, seq=update_id.seq))

    @rule(die_before=sometimes(4))
    def deliver(self, die_before: int | None) -> None:
        if (delivery := self.broker.deliver()) is not None:
            self.send(on.Arrived(delivery[0], delivery[1], 8), die_before)

    @rule(die_before=sometimes(2))
    def announce(self, die_before: int | None) -> None:
        """An update in chunks, as far as its manifest tells of it."""
        if (delivery := self.broker.deliver()) is not None:
            self.send(on.Announced(delivery[0], delivery[1], delivery[1].model), die_before)

    @precondition(lambda self: self.fetches)
    @rule()
    def announce_again(self) -> None:
        """The worker has sent once more what is being fetched."""
        self.broker.waiting.appendleft(self.broker.unacked[self.fetches[0]])
        self.announce(die_before=None)

    @precondition(lambda self: self.fetches)
    @rule(are_lost=st.booleans(), die_before=sometimes(4))
    def chunks_come(self, are_lost: bool, die_before: int | None) -> None:
        token = self.fetches.popleft()
        update = self.broker.unacked[token]
        if are_lost:
            reason = Reason.INCOMPLETE
            self.send(on.Unreadable(token, reason, "chunk 1 is missing", update.id.worker, update.id), die_before)
        else:
            self.send(on.Arrived(token, update, 8), die_before)

    @rule(die_before=sometimes(4))
    def deliver_without_room(self, die_before: int | None) -> None:
        """The update waits in the shell, and arrives again when there is room; whatever happens meanwhile is next."""
        if (delivery := self.broker.deliver()) is None:
            return
        before, self.spool.is_full = self.machine.applied, True
        try:
            self.send(on.Arrived(delivery[0], delivery[1], 8))
        except CheckpointNotWritten:
            assert self.machine.applied == before
            self.send(on.Tick())
            self.spool.is_full = False
            self.send(on.Arrived(delivery[0], delivery[1], 8), die_before)
        finally:
            self.spool.is_full = False

    @precondition(lambda self: self.flight is not None and not self.is_copied)
    @rule()
    def accumulator_is_copied(self) -> None:
        """All of it has been read: from now on it may be folded into, and the checkpoint may fail all the same."""
        assert self.flight is not None
        self.is_copied = True
        self.send(on.CheckpointCopied(self.flight[0]))
        assert not self.machine.lends

    @rule(by=st.integers(1, 3))
    def another_checkpoint_was_copied(self, by: int) -> None:
        """As when this is heard of after it was written, or failed, and the next is on its way."""
        lends = self.machine.lends
        self.send(on.CheckpointCopied((self.flight[0] if self.flight is not None else 10_000) - by))
        assert self.machine.lends == lends

    @precondition(lambda self: self.flight is not None)
    @rule(die_before=sometimes(6))
    def checkpoint_is_written(self, die_before: int | None) -> None:
        assert self.flight is not None
        commit, _, copied = self.flight
        self.flight, self.disk = None, copied
        self.send(on.CheckpointWritten(commit), die_before)

    @precondition(lambda self: self.flight is not None)
    @rule()
    def checkpoint_fails(self) -> None:
        assert self.flight is not None
        commit, self.flight = self.flight[0], None
        self.send(on.CheckpointFailed(commit, "disk full"))

    @rule(is_lost=RARELY)
    def connection_is_lost(self, is_lost: bool) -> None:
        if not is_lost:
            return
        self.fetches.clear()
        self.send(on.LinkLost(self.broker.cut()))
        self.send(on.LinkUp(self.broker.generation))

    @rule(dies=RARELY)
    def aggregator_dies(self, dies: bool) -> None:
        if dies:
            self.crash()

    @rule(seconds=st.sampled_from([0.5, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.clock += seconds
        self.send(on.Tick())

    # ------------------------------------------------------------------------------------- what must hold

    @invariant()
    def durable_state_counts_each_id_once(self) -> None:
        if not hasattr(self, "disk"):
            return
        ids = list(Ledger(self.disk.ledger))
        rows = self.disk.accumulator.rows
        total = self.disk.parameters["n"] + self.disk.accumulator.tensors.get("n", 0)
        total = total if rows is None else total + rows.block(0, rows.size).sum(axis=0)
        for worker in range(WORKERS):
            assert total[worker] == sum(update_id.worker == f"w{worker}" for update_id in ids)
        assert len(ids) == len(set(ids))
        assert self.acked <= set(ids)
        assert len(self.disk.entries) == self.disk.accumulator.count == (rows.count if rows else len(self.disk.entries))

    @invariant()
    def nothing_is_forgotten(self) -> None:
        """What is not acknowledged waits for a commit or for its chunks; a lost connection need not bring it back."""
        if not hasattr(self, "disk"):
            return
        awaited = {token for held in self.machine._commits.held.values() for token in held.tokens}
        awaited |= {token for tokens in self.machine._fetching.values() for token in tokens}
        assert self.broker.unacked.keys() == awaited | set(self.fetches)

    @invariant()
    def nothing_that_is_lent_is_written_into(self) -> None:
        """Nothing of a snapshot changes until it is written or has failed, its accumulator until it is copied."""
        if not hasattr(self, "disk") or self.flight is None:
            return
        _, snapshot, copied = self.flight
        lent = [(snapshot.parameters, copied.parameters)]
        lent += [(snapshot.optimizer.slots[slot], copied.optimizer.slots[slot]) for slot in copied.optimizer.slots]
        sums = snapshot.accumulator, copied.accumulator
        assert sums[0].count == sums[1].count == len(snapshot.entries)
        if sums[0].rows is not None and sums[1].rows is not None:
            rows = [one.block(0, one.size).tolist() for one in (sums[0].rows, sums[1].rows)]
            assert rows[0] == rows[1], "rows that were lent have changed"
        if not self.is_copied:
            lent.append((sums[0].tensors, sums[1].tensors))
        for arrays, before in lent:
            assert arrays.keys() == before.keys()
            for name, array in arrays.items():
                np.testing.assert_array_equal(array, before[name], f"{name} was lent and written into")

    def every_version_is_told(self) -> None:
        """The lineage names each applied id exactly once."""
        self.remember(self.disk.records)
        assert sorted(self.history) == list(range(1, self.disk.version + 1))
        told = [entry.id for record in self.history.values() for entry in record.updates]
        told += [entry.id for entry in self.disk.entries]
        assert sorted(told) == sorted(Ledger(self.disk.ledger))

    def teardown(self) -> None:
        """Heal everything and drain: nothing is lost, nothing waits for ever."""
        if not hasattr(self, "disk"):
            return
        for _ in range(10_000):
            if self.flight is not None:
                self._write()
            elif self.fetches:
                self.chunks_come(are_lost=False, die_before=None)
            elif (delivery := self.broker.deliver()) is not None:
                self.send(on.Arrived(delivery[0], delivery[1], 8))
            elif self.broker.unacked:
                self.clock += 1e9
                self.send(on.Tick())
            else:
                break
        assert not self.broker.unacked
        assert not self.broker.waiting
        assert set(Ledger(self.disk.ledger)) | self.dead == self.published
        self.durable_state_counts_each_id_once()
        self.every_version_is_told()

    def _write(self) -> None:
        assert self.flight is not None
        commit, _, copied = self.flight
        self.flight, self.disk = None, copied
        self.send(on.CheckpointWritten(commit))


Exactly.TestCase.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)
TestExactlyOnce: Any = Exactly.TestCase
