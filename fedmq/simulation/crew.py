"""All workers of a scenario, as arrays.

What a worker does is what ``worker_client.core.machine`` makes a real one do: it trains from the newest version that
has reached it, as often as the plan allows, publishes, and goes on; in synchronous rounds once, if it was drawn. A
version that comes in mid-training does not stop the training. Left out: rests after rejections, evaluators, chunks.

The ends of trainings are numbers in a heap: the time, and the worker in its last places.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Callable
from typing import Protocol

from aggregator.core import events as on
from broker.errors import ConfigError
from broker.messages import Goodbye, Hello, Parameters, Rounds
from fedmq.simulation.aggregator import Letter
from fedmq.simulation.author import LIFE, Author
from fedmq.simulation.clock import NEVER, seconds_of, ticks
from fedmq.simulation.population import Availability, Speeds
from fedmq.simulation.randomness import drawn, stream
from fedmq.simulation.scenario import Scenario
from fedmq.simulation.shelf import Shelf

__all__ = ["Crew", "Host", "Workers"]


class Host(Protocol):
    """What workers live in."""

    def schedule(self, time: int, what: Callable[[int], None]) -> None:
        """Call ``what`` with the time at ``time``."""

    def tell(self, event: on.Happening, now: int) -> None:
        """Let the aggregator know."""

    def publish(self, letter: Letter, now: int) -> None:
        """Send an update."""

    def download(self) -> int:
        """A worker takes the newest version; how long that takes."""

    def lose(self) -> None:
        """A worker has disappeared."""


class Workers(Protocol):
    """Those who train."""

    @property
    def due(self) -> int:
        """When something happens next to one of them; ``NEVER`` if nothing will."""

    @property
    def is_over(self) -> bool:
        """Whether they will do nothing more, whatever happens."""

    def begin(self) -> None:
        """The scenario begins."""

    def step(self, now: int) -> None:
        """What happens at :attr:`due`, which is ``now``."""

    def reach(self, base: Parameters, now: int) -> None:
        """``base`` is with all of them."""

    @property
    def here(self) -> int:
        """How many there are."""


class Crew:
    """Workers who train as fast as they can. See the module."""

    def __init__(self, scenario: Scenario, author: Author, host: Host) -> None:
        seed, count = scenario.run.seed, len(author.names)
        self.due = NEVER
        self.is_over = False
        self._run, self._names, self._author, self._host = scenario.run.name, author.names, author, host
        self._count = count
        self._silence = ticks(scenario.aggregator.worker_timeout)
        self._speeds = Speeds(scenario.population, seed)
        self._availability = Availability(scenario.population, seed)
        self._require_in_time(scenario)
        self._dropout = scenario.population.dropout
        self._chance = drawn(stream(seed, "dropout").random)
        self._shelf = Shelf()
        self._ends: list[int] = []
        # By worker: the version that it trains from (-1 if it does not), when that ends, and for which version, asked
        # how often, it has trained how many times.
        self._base = array("q", [-1]) * count
        self._end = array("q", [NEVER]) * count
        self._told = array("q", [-1]) * count
        self._asked = array("q", bytes(8 * count))
        self._sent = array("q", bytes(8 * count))
        self._is_here = bytearray(count)
        self._is_lost = bytearray(count)
        self._waits = bytearray(count)
        self._waiting: list[int] = []

    def _require_in_time(self, scenario: Scenario) -> None:
        """Raise :class:`ConfigError` if nobody can answer before a synchronous round's deadline."""
        deadline = scenario.aggregator.deadline
        if deadline is None or scenario.aggregator.rounds is not Rounds.SYNCHRONOUS or scenario.population.jitter:
            return
        shortest = seconds_of(self._speeds.shortest) + 2 * scenario.network.latency
        if deadline < shortest:
            raise ConfigError(
                f"aggregator.deadline = {deadline:g}, but the fastest worker takes {shortest:g} s to answer: no update "
                "would ever count; take a longer deadline, faster workers or buffered rounds"
            )

    @property
    def here(self) -> int:
        """As :class:`Workers`."""
        return sum(self._is_here)

    def begin(self) -> None:
        """As :class:`Workers`."""
        for worker in range(self._count):
            if self._availability.is_on_at_start(worker):
                self._come(worker, 0)
            if self._availability.changes:
                self._host.schedule(self._availability.first_change(worker), self._changer(worker))

    def step(self, now: int) -> None:
        """As :class:`Workers`."""
        worker = heapq.heappop(self._ends) % self._count
        if self._end[worker] == now:  # if not, it left meanwhile
            self._trained(worker, now)
        self._look_ahead()

    def reach(self, base: Parameters, now: int) -> None:
        """As :class:`Workers`; those that wait begin."""
        is_first = self._shelf.newest is None
        self._shelf.put(base)
        waiting, self._waiting = self._waiting, []
        for worker in waiting:
            self._waits[worker] = False
        for worker in range(self._count) if is_first else waiting:
            self._train(worker, now)
        self._look_ahead()

    def _look_ahead(self) -> None:
        self.due = self._ends[0] // self._count if self._ends else NEVER

    def _come(self, worker: int, now: int) -> None:
        self._is_here[worker] = True
        self._host.tell(on.Joined(Hello(run=self._run, worker=self._names[worker], incarnation=LIFE)), now)
        self._train(worker, now)
        self._look_ahead()

    def _go(self, worker: int, now: int) -> None:
        self._end[worker] = NEVER
        if self._base[worker] >= 0:
            self._shelf.give_back(self._base[worker])
            self._base[worker] = -1
        self._is_here[worker] = False
        self._host.tell(self._goodbye(worker, "away"), now)

    def _goodbye(self, worker: int, reason: str) -> on.Left:
        return on.Left(Goodbye(run=self._run, worker=self._names[worker], incarnation=LIFE, reason=reason))

    def _changer(self, worker: int) -> Callable[[int], None]:
        def change(now: int) -> None:
            if self._is_lost[worker]:
                return
            is_on = not self._is_here[worker]
            if is_on:
                self._come(worker, now)
            else:
                self._go(worker, now)
            self._host.schedule(self._availability.next_change(now, is_on=is_on), change)

        return change

    def _train(self, worker: int, now: int) -> None:
        """From the newest version, if there is one that the plan lets ``worker`` train from; it waits otherwise."""
        base = self._shelf.newest
        if base is None or not self._is_here[worker] or self._base[worker] >= 0:
            return
        plan, version = base.plan, base.version
        is_new = self._told[worker] != version or self._asked[worker] != plan.asked
        if not self._is_asked(worker, base, is_new=is_new):
            if not self._waits[worker]:
                self._waits[worker] = True
                self._waiting.append(worker)
            return
        end = now + self._speeds.next(worker)
        if is_new:
            self._told[worker], self._asked[worker], self._sent[worker] = version, plan.asked, 0
            end += self._host.download()
        self._sent[worker] += 1
        self._base[worker] = self._shelf.take()
        self._end[worker] = end
        heapq.heappush(self._ends, end * self._count + worker)

    def _is_asked(self, worker: int, base: Parameters, *, is_new: bool) -> bool:
        plan = base.plan
        if plan.paused or plan.done:
            return False
        if plan.rounds is Rounds.SYNCHRONOUS and not plan.is_sampled(self._names[worker], base.version):
            return False
        return is_new or self._sent[worker] < plan.updates_per_version

    def _trained(self, worker: int, now: int) -> None:
        version = self._base[worker]
        self._base[worker], self._end[worker] = -1, NEVER
        if self._dropout and next(self._chance) < self._dropout:
            self._disappear(worker, now)
        else:
            letter = self._author.letter(worker, self._shelf[version], self._sent[worker] - 1)
            self._host.publish(letter, now)
        self._shelf.give_back(version)
        self._train(worker, now)

    def _disappear(self, worker: int, now: int) -> None:
        """Without a goodbye: the aggregator notices when no heartbeat has come for some time."""
        self._is_here[worker], self._is_lost[worker] = False, True
        self._host.lose()
        self._host.schedule(now + self._silence, lambda then: self._host.tell(self._goodbye(worker, "silent"), then))
