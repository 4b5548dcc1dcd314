"""Virtual time: workers that train, publish and come and go around a simulated aggregator.

What a worker does is what ``worker_client.core.machine`` makes a real one do, in arrays instead of objects: it trains
from the newest version that has reached it, as often as the plan allows, publishes, and goes on; in synchronous rounds
once, if it was drawn. A version that comes in mid-training does not stop the training. Left out: rests after
rejections, evaluators, and chunks.

Two heaps: the ends of trainings, each one number, and everything else, which is seldom. At the same time the rest
comes first, then trainings by the workers' numbers: nothing is left to chance.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.snapshot import Snapshot
from aggregator.optimizers import OptimizerState
from aggregator.strategies.base import Accumulator
from broker.errors import ConfigError, FedmqError
from broker.messages import (
    Goodbye,
    Hello,
    Parameters,
    Rounds,
    Update,
    UpdateId,
    parameters_digest,
)
from broker.wire import decode, encode
from fedmq.simulation.aggregator import Letter, SimulatedAggregator
from fedmq.simulation.attackers import Attackers
from fedmq.simulation.clock import NEVER, seconds_of, ticks
from fedmq.simulation.coding import Coders
from fedmq.simulation.network import Network
from fedmq.simulation.objectives import GROWS, Objective
from fedmq.simulation.population import Availability, Speeds, names_of
from fedmq.simulation.randomness import drawn, stream
from fedmq.simulation.record import Point, Result
from fedmq.simulation.scenario import Scenario

__all__ = ["World"]

#: Incarnation of all workers: none starts twice.
LIFE = "s"
#: So many things in a row that bring no update forward, for each worker, are a standstill.
PATIENCE = 1000


class World:
    """One scenario from its beginning to its end. See the module."""

    def __init__(self, scenario: Scenario, objective: Objective) -> None:
        run, count = scenario.run, scenario.population.workers
        self.scenario = scenario
        self.objective = objective
        self.names = names_of(count)
        metric = run.metric or objective.metric
        self.result = Result(name=run.name, seed=run.seed, metric=metric, target=run.target)
        self._speeds = Speeds(scenario.population, run.seed)
        self._availability = Availability(scenario.population, run.seed)
        self._network = Network(scenario.network, run.seed)
        self._attackers = Attackers(scenario.attack, count, objective.model, run.seed)
        self._coders = Coders(objective.model, self.names, LIFE)
        self._down_bytes = objective.model.nbytes
        chance = stream(run.seed, "dropout")
        self._dropout = drawn(chance.random)
        # The workers, by number.
        self._sequence = array("q", bytes(8 * count))
        self._base = array("q", [-1]) * count  # the version that it trains from; -1: it does not train
        self._due = array("q", [NEVER]) * count
        self._told = array("q", [-1]) * count  # the version that it was counted for, and how often
        self._told_asked = array("q", bytes(8 * count))
        self._sent = array("q", bytes(8 * count))
        self._is_here = bytearray(count)
        self._waits = bytearray(count)
        self._trainings: list[int] = []
        self._agenda: list[tuple[int, int, Callable[[int], None]]] = []
        self._order = 0
        self._versions: dict[int, Parameters] = {}
        self._users: Counter[int] = Counter()
        self._newest: Parameters | None = None
        self._waiting: list[int] = []
        self._idle_events = 0
        self._count = count
        self._is_over = False
        self.now = 0
        self.aggregator = self._new_aggregator()

    def _new_aggregator(self) -> SimulatedAggregator:
        scenario, model = self.scenario, self.objective.model
        initial = self.objective.initial()
        rules = scenario.aggregator.rules(model.nbytes)
        if scenario.run.versions is not None:
            rules = replace(rules, stop_after_rounds=scenario.run.versions)
        snapshot = Snapshot(
            run=scenario.run.name,
            model=model,
            epoch=0,
            version=0,
            parameters=initial,
            digest=parameters_digest(initial),
            optimizer=OptimizerState({}),
            accumulator=Accumulator(),
            mode=rules.mode.value,
        )
        faults = scenario.faults
        return SimulatedAggregator(
            rules,
            snapshot,
            prefetch=scenario.aggregator.prefetch(model.nbytes),
            checkpoint_ticks=ticks(faults.checkpoint_seconds),
            can_crash=bool(faults.crash_every or faults.crash_times),
            observer=self,
            schedule=self.schedule,
        )

    # ------------------------------------------------------------------------------------------- the clock

    def schedule(self, time: int, what: Callable[[int], None]) -> None:
        """Call ``what`` at ``time``; what was scheduled first comes first."""
        self._order += 1
        heapq.heappush(self._agenda, (time, self._order, what))

    def run(self) -> Result:
        """Until the scenario ends.

        Raises:
            ConfigError: it has come to a standstill.
            FedmqError: what ended the aggregator.
        """
        self._begin()
        limit = ticks(self.scenario.run.seconds) if self.scenario.run.seconds is not None else NEVER
        trainings, agenda, count, aggregator = self._trainings, self._agenda, self._count, self.aggregator
        result = self.result
        while not self._is_over:
            training = trainings[0] // count if trainings else NEVER
            other = agenda[0][0] if agenda else NEVER
            wake = aggregator.wake_at
            time = min(training, other, wake)
            if time > limit:
                self._end("seconds", limit)
                break
            if time >= NEVER or self._idle_events > PATIENCE * (count + 10):
                raise ConfigError(self._standstill())
            self.now = time
            result.events += 1
            self._idle_events += 1
            if other == time:
                heapq.heappop(agenda)[2](time)
            elif wake == time:
                aggregator.wake(time)
            else:
                self._trained(heapq.heappop(trainings) % count, time)
        return self._closed()

    def _begin(self) -> None:
        self.aggregator.start(0)
        for worker in range(self._count):
            if self._availability.is_on_at_start(worker):
                self._come(worker, 0)
            if self._availability.changes:
                self.schedule(self._availability.first_change(worker), self._changer(worker))
        faults = self.scenario.faults
        for time in faults.crash_times:
            self.schedule(ticks(time), self._crash)
        if faults.crash_every is not None:
            chance = stream(self.scenario.run.seed, "crashes")
            self._crash_pauses = drawn(lambda count: chance.exponential(faults.crash_every or 1.0, count))
            self._plan_crash(0)

    def _standstill(self) -> str:
        machine = self.aggregator.machine
        here = sum(self._is_here)
        return (
            f"the scenario comes to a standstill at {seconds_of(self.now):g} s: version {machine.version} has "
            f"{machine.fill} updates and waits for more, with {here} of {self._count} workers there; take a smaller "
            "aggregator.buffer_size or minimum_updates, a longer deadline, or let more workers stay"
        )

    def _end(self, why: str, now: int) -> None:
        self._is_over = True
        self.result.ended = why
        self.now = now

    def _closed(self) -> Result:
        result, machine = self.result, self.aggregator.machine
        result.seconds = seconds_of(self.now)
        result.versions = machine.version
        result.updates = machine.applied
        result.crashes = self.aggregator.crashes
        result.digest = parameters_digest(machine.parameters)
        if not result.points or result.points[-1].version != machine.version:
            self._evaluate(machine.version, machine.parameters)
        return result

    # ---------------------------------------------------------------------------------------------- workers

    def published(self) -> list[tuple[str, int]]:
        """Each worker, and how many updates it has made."""
        return list(zip(self.names, self._sequence, strict=True))

    def _come(self, worker: int, now: int) -> None:
        self._is_here[worker] = True
        hello = Hello(run=self.scenario.run.name, worker=self.names[worker], incarnation=LIFE)
        self.aggregator.handle(on.Joined(hello), now)
        self._begin_training(worker, now)

    def _go(self, worker: int, now: int, reason: str) -> None:
        self._give_up(worker)
        self._is_here[worker] = False
        goodbye = Goodbye(run=self.scenario.run.name, worker=self.names[worker], incarnation=LIFE, reason=reason)
        self.aggregator.handle(on.Left(goodbye), now)

    def _give_up(self, worker: int) -> None:
        self._due[worker] = NEVER
        if self._base[worker] >= 0:
            self._let_go(self._base[worker])
            self._base[worker] = -1

    def _changer(self, worker: int) -> Callable[[int], None]:
        def change(now: int) -> None:
            is_on = not self._is_here[worker]
            if is_on:
                self._come(worker, now)
            else:
                self._go(worker, now, "away")
            self.schedule(self._availability.next_change(worker, now, is_on=is_on), change)

        return change

    def _begin_training(self, worker: int, now: int) -> None:
        """From the newest version, if there is one that the plan lets ``worker`` train from; it waits otherwise."""
        base = self._newest
        if base is None or not self._is_here[worker] or self._base[worker] >= 0:
            return
        plan, version = base.plan, base.version
        if not self._is_asked(worker, base):
            if not self._waits[worker]:
                self._waits[worker] = True
                self._waiting.append(worker)
            return
        if self._told[worker] != version or self._told_asked[worker] != plan.asked:
            self._told[worker], self._told_asked[worker], self._sent[worker] = version, plan.asked, 0
            self.result.bytes_down += self._down_bytes
        self._sent[worker] += 1
        self._base[worker] = version
        self._users[version] += 1
        due = now + self._speeds.next(worker) + self._network.download(self._down_bytes)
        self._due[worker] = due
        heapq.heappush(self._trainings, due * self._count + worker)

    def _is_asked(self, worker: int, base: Parameters) -> bool:
        plan = base.plan
        if plan.paused or plan.done:
            return False
        if plan.rounds is Rounds.SYNCHRONOUS and not plan.is_sampled(self.names[worker], base.version):
            return False
        is_new = self._told[worker] != base.version or self._told_asked[worker] != plan.asked
        return is_new or self._sent[worker] < plan.updates_per_version

    def _trained(self, worker: int, now: int) -> None:
        if self._due[worker] != now:
            return  # it left meanwhile
        self._due[worker] = NEVER
        version, self._base[worker] = self._base[worker], -1
        base = self._versions[version]
        dropout = self.scenario.population.dropout
        if dropout and next(self._dropout) < dropout:
            self._let_go(version)
            self._disappear(worker, now)
            return
        letter = self._letter(worker, base)
        self._let_go(version)
        self.result.published += 1
        self._network.send(letter, now, self)
        self._begin_training(worker, now)

    def _disappear(self, worker: int, now: int) -> None:
        """Without a goodbye: the aggregator notices when no heartbeat has come for some time."""
        self._is_here[worker] = False
        self.result.left += 1
        silence = ticks(self.scenario.aggregator.worker_timeout)
        goodbye = Goodbye(run=self.scenario.run.name, worker=self.names[worker], incarnation=LIFE, reason="silent")
        self.schedule(now + silence, lambda then: self.aggregator.handle(on.Left(goodbye), then))

    def _letter(self, worker: int, base: Parameters) -> Letter:
        ordinal = self._sent_before(worker, base)
        work = self.objective.train(worker, base, ordinal)
        if self._attackers:
            work = replace(work, tensors=self._attackers.sent(worker, work.tensors))
        work = self._coders.coded(worker, work, base, ordinal)
        sequence = self._sequence[worker]
        self._sequence[worker] = sequence + 1
        name = self.names[worker]
        update = Update(
            run=base.run,
            id=UpdateId(name, LIFE, sequence),
            base_version=base.version,
            base_epoch=base.epoch,
            mode=base.plan.mode,
            examples=work.examples,
            metrics=dict(work.metrics),
            model=base.model,
            tensors=work.tensors,
            codec=work.codec,
            seed=work.seed,
        )
        if not self.scenario.run.wire:
            return Letter(update, base.model.nbytes, name)
        body = encode(update)
        return Letter(body, len(body), name)

    def _sent_before(self, worker: int, base: Parameters) -> int:
        """Which of its trainings from this version that is, from 0."""
        is_this = self._told[worker] == base.version
        return self._sent[worker] - 1 if is_this else 0

    def arrived(self, letter: Letter, now: int) -> None:
        """The broker has ``letter``."""
        self.result.deliveries += 1
        self.aggregator.arrive(letter, now)

    def sent(self, nbytes: int) -> None:
        """A worker has sent so much, whether it arrives or not."""
        self.result.bytes_up += nbytes

    # ------------------------------------------------------------------------------------------- aggregator

    def broadcast(self, effect: do.Broadcast) -> None:
        """As :class:`Observer`."""
        base = self._parameters(effect)
        if effect.plan.done:
            self._reach(base)
            self._end("versions", self.now)
            return
        delay = self._network.delay
        if delay:
            self.schedule(self.now + delay, lambda now: self._reach(base, now))
        else:
            self._reach(base)

    def _parameters(self, effect: do.Broadcast) -> Parameters:
        parameters = Parameters(
            run=self.scenario.run.name,
            epoch=effect.epoch,
            version=effect.version,
            plan=effect.plan,
            digest=effect.digest,
            model=effect.model,
            tensors=effect.parameters,
        )
        if not self.scenario.run.wire:
            return parameters
        body = encode(parameters)
        self._down_bytes = len(body)
        message = decode(body)
        if not isinstance(message, Parameters):
            raise FedmqError("a version that was encoded is none when it is decoded")
        return message

    def _reach(self, base: Parameters, now: int | None = None) -> None:
        """``base`` is with all workers; those that wait begin."""
        now = self.now if now is None else now
        before = self._newest
        self._newest = base
        self._versions[base.version] = base
        if before is not None and before.version != base.version and not self._users[before.version]:
            del self._users[before.version]
            self._versions.pop(before.version, None)
        waiting, self._waiting = self._waiting, []
        for worker in waiting:
            self._waits[worker] = False
        if before is None:
            waiting = list(range(self._count))
        for worker in waiting:
            self._begin_training(worker, now)

    def _let_go(self, version: int) -> None:
        self._users[version] -= 1
        if not self._users[version]:
            del self._users[version]
            if self._newest is None or version != self._newest.version:
                self._versions.pop(version, None)

    def record(self, fact: do.Fact) -> None:
        """As :class:`Observer`."""
        kind = type(fact)
        if kind is do.Folded:
            self._idle_events = 0
            self.result.staleness[fact.entry.staleness] += 1  # type: ignore[union-attr]
            limit = self.scenario.run.updates
            if limit is not None and self.aggregator.machine.applied >= limit:
                self._end("updates", self.now)
        elif kind is do.Rejected:
            self.result.rejected[fact.reason.value] += 1  # type: ignore[union-attr]
        elif kind is do.Repeated:
            self.result.repeated += 1
        elif kind is do.Warn:
            self.result.warnings[fact.text] += 1  # type: ignore[union-attr]
        elif kind is do.VersionMade:
            version = fact.record.version  # type: ignore[union-attr]
            if version % self.scenario.run.evaluate_every == 0:
                self._evaluate(version, self.aggregator.machine.parameters)

    def tell(self, effect: do.Tell) -> None:
        """As :class:`Observer`; a worker that was refused takes the newest version in any case."""

    def finish(self) -> None:
        """As :class:`Observer`."""
        self._is_over = True

    def _evaluate(self, version: int, parameters: object) -> None:
        result, run = self.result, self.scenario.run
        metrics = self.objective.score(parameters)  # type: ignore[arg-type]
        if result.metric not in metrics:
            raise ConfigError(
                f"run.metric = {result.metric!r} is not measured here; there are {', '.join(sorted(metrics))}"
            )
        point = Point(
            seconds=seconds_of(self.now),
            version=version,
            updates=self.aggregator.machine.applied,
            bytes_up=result.bytes_up,
            bytes_down=result.bytes_down,
            metrics=metrics,
        )
        result.points.append(point)
        if run.target is None or result.reached is not None:
            return
        value = metrics[result.metric]
        if value >= run.target if result.metric in GROWS else value <= run.target:
            result.reached = point
            self._end("target", self.now)

    # ----------------------------------------------------------------------------------------------- faults

    def _crash(self, now: int) -> None:
        if self.aggregator.is_up:
            self.aggregator.crash(now)
            self.schedule(now + ticks(self.scenario.faults.downtime), self.aggregator.start)

    def _plan_crash(self, now: int) -> None:
        def crash(then: int) -> None:
            self._crash(then)
            self._plan_crash(then)

        self.schedule(now + max(1, ticks(next(self._crash_pauses))), crash)
