"""Virtual time: workers, network and faults around a simulated aggregator, one thing after the other.

At the same time what is seldom comes first, then what the aggregator wanted to be woken for, then the ends of
trainings, by the workers' numbers: nothing is left to chance.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.snapshot import Snapshot
from aggregator.optimizers import OptimizerState
from aggregator.strategies.base import Accumulator
from broker.errors import ConfigError, FedmqError
from broker.messages import Parameters, Reason, Tensors, parameters_digest
from broker.wire import decode, encode
from fedmq.simulation.aggregator import Letter, SimulatedAggregator
from fedmq.simulation.author import Author
from fedmq.simulation.clock import NEVER, seconds_of, ticks
from fedmq.simulation.crew import Crew, Workers
from fedmq.simulation.network import Network
from fedmq.simulation.objectives import FALLS, GROWS, Objective
from fedmq.simulation.population import names_of
from fedmq.simulation.randomness import drawn, stream
from fedmq.simulation.record import Point, Result
from fedmq.simulation.scenario import Scenario
from fedmq.simulation.traces import Trace, TraceCrew

__all__ = ["World"]

#: So many things in a row that bring no update forward, for each worker, are a standstill.
PATIENCE = 1000
#: So many updates in a row that are refused, for each worker: a real one whose training diverges gives up then, too.
REFUSED = 10


class World:
    """One scenario from its beginning to its end. See the module.

    Args:
        scenario: what happens.
        objective: what is learned.
        trace: when the workers train, if that is given.
    """

    def __init__(self, scenario: Scenario, objective: Objective, trace: Trace | None = None) -> None:
        run = scenario.run
        self.scenario = scenario
        self.objective = objective
        metric = run.metric or objective.metric
        grows = metric in GROWS if run.goal is None else run.goal == "at-least"
        if run.target is not None and run.goal is None and metric not in GROWS | FALLS:
            raise ConfigError(f"is more of {metric!r} better? run.target needs run.goal: 'at-least' or 'at-most'")
        self.result = Result(name=run.name, seed=run.seed, metric=metric, target=run.target, grows=grows)
        self.now = 0
        self._network = Network(scenario.network, run.seed)
        self._down_bytes = objective.model.nbytes
        self._agenda: list[tuple[int, int, Callable[[int], None]]] = []
        self._order = 0
        self._idle = self._refused = 0
        self._is_over = False
        names = names_of(scenario.population.workers) if trace is None else trace.names
        self.author = Author(scenario, objective, names)
        self._workers: Workers = (
            Crew(scenario, self.author, self) if trace is None else TraceCrew(scenario, trace, self.author, self)
        )
        self._most_idle = PATIENCE * (len(names) + 10)
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

    def run(self) -> Result:
        """Until the scenario ends.

        Raises:
            ConfigError: it has come to a standstill.
            FedmqError: what ended the aggregator.
        """
        self.aggregator.start(0)
        self._evaluate(0, self.aggregator.machine.parameters)
        self._workers.begin()
        self._plan_crashes()
        limit = ticks(self.scenario.run.seconds) if self.scenario.run.seconds is not None else NEVER
        agenda, workers, aggregator, result = self._agenda, self._workers, self.aggregator, self.result
        while not self._is_over:
            other = agenda[0][0] if agenda else NEVER
            time = min(workers.due, other, aggregator.wake_at)
            if time > limit:
                self._end("seconds", limit)
                break
            if time >= NEVER or self._idle > self._most_idle:
                self._stand_still()
                break
            self.now = time
            result.events += 1
            self._idle += 1
            if other == time:
                heapq.heappop(agenda)[2](time)
            elif aggregator.wake_at == time:
                aggregator.wake(time)
            else:
                workers.step(time)
        return self._closed()

    def schedule(self, time: int, what: Callable[[int], None]) -> None:
        """Call ``what`` at ``time``; what was scheduled first comes first."""
        self._order += 1
        heapq.heappush(self._agenda, (time, self._order, what))

    def _stand_still(self) -> None:
        if self._workers.is_over:
            self._end("trace", self.now)
            return
        machine = self.aggregator.machine
        raise ConfigError(
            f"the scenario comes to a standstill at {seconds_of(self.now):g} s: version {machine.version} has "
            f"{machine.fill} updates and waits for more, with {self._workers.here} of {len(self.author.names)} workers "
            "there; take a smaller aggregator.buffer_size or minimum_updates, or let more workers stay"
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

    # ---------------------------------------------------------------------------------------- the workers' host

    def tell(self, event: on.Happening, now: int) -> None:
        """As :class:`Host`."""
        self.aggregator.control(event, now)

    def publish(self, letter: Letter, now: int) -> None:
        """As :class:`Host`."""
        self.result.published += 1
        self._network.send(letter, now, self)

    def download(self) -> int:
        """As :class:`Host`."""
        self.result.bytes_down += self._down_bytes
        return self._network.download(self._down_bytes)

    def lose(self) -> None:
        """As :class:`Host`."""
        self.result.left += 1

    def sent(self, nbytes: int) -> None:
        """As :class:`Mailbox`."""
        self.result.bytes_up += nbytes

    def arrived(self, letter: Letter, now: int) -> None:
        """As :class:`Mailbox`."""
        self.result.deliveries += 1
        self.aggregator.arrive(letter, now)

    # --------------------------------------------------------------------------------- the aggregator's observer

    def broadcast(self, effect: do.Broadcast) -> None:
        """As :class:`Observer`. It is durable, and of the versions that became so together the last."""
        points, every = self.result.points, self.scenario.run.evaluate_every
        if points and effect.version // every > points[-1].version // every:
            self._evaluate(effect.version, effect.parameters)
        base = self._as_told(effect)
        if effect.plan.done:
            self._end("versions", self.now)
        elif self._network.delay:
            self.schedule(self.now + self._network.delay, lambda then: self._workers.reach(base, then))
        else:
            self._workers.reach(base, self.now)

    def _as_told(self, effect: do.Broadcast) -> Parameters:
        """What workers get: of bytes that were written and read again, if there is a wire."""
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

    def record(self, fact: do.Fact) -> None:
        """As :class:`Observer`."""
        match fact:
            case do.Folded(entry):
                self._idle = self._refused = 0
                self.result.staleness[entry.staleness] += 1
                limit = self.scenario.run.updates
                if limit is not None and self.aggregator.machine.applied >= limit:
                    self._end("updates", self.now)
            case do.Rejected(_, reason):
                self.result.rejected[reason.value] += 1
                self._refused += 1
                if self._refused > REFUSED * (len(self.author.names) + 10):
                    self._give_up(reason)
            case do.Repeated():
                self.result.repeated += 1
            case do.Warn(text):
                self.result.warnings[text] += 1
            case _:
                pass

    def _give_up(self, reason: Reason) -> NoReturn:
        hint = ""
        if reason is Reason.NOT_FINITE:
            hint = ": training diverges; lower worker.learning_rate, objective.local_rate or aggregator.learning_rate"
        raise ConfigError(
            f"none of the last {self._refused} updates was taken, the last one as {reason.value}{hint}; version "
            f"{self.aggregator.machine.version} was reached at {seconds_of(self.now):g} s"
        )

    def finish(self) -> None:
        """As :class:`Observer`."""
        self._is_over = True

    def _evaluate(self, version: int, parameters: Tensors) -> None:
        result, run = self.result, self.scenario.run
        metrics = self.objective.score(parameters)
        if result.metric not in metrics:
            known = ", ".join(sorted(metrics))
            raise ConfigError(f"run.metric = {result.metric!r} is not measured here; there are {known}")
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
        if value >= run.target if result.grows else value <= run.target:
            result.reached = point
            self._end("target", self.now)

    # ----------------------------------------------------------------------------------------------- faults

    def _plan_crashes(self) -> None:
        faults = self.scenario.faults
        for time in faults.crash_times:
            self.schedule(ticks(time), self._crash)
        if faults.crash_every is not None:
            mean, chance = faults.crash_every, stream(self.scenario.run.seed, "crashes")
            pauses = drawn(lambda count: chance.exponential(mean, count))

            def crash(now: int) -> None:
                self._crash(now)
                self.schedule(now + max(1, ticks(next(pauses))), crash)

            self.schedule(max(1, ticks(next(pauses))), crash)

    def _crash(self, now: int) -> None:
        if self.aggregator.is_up:
            self.aggregator.crash()
            self.schedule(now + ticks(self.scenario.faults.downtime), self.aggregator.start)
