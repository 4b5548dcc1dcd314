"""What is done to a federation, drawn from a seed: which fault, when, to whom, for how long.

The draws follow from the seed alone. Whom "the active aggregator" means, and whether it is there to be killed,
depends on the run; a fault that finds nobody is passed over and counted as such.
"""

from __future__ import annotations

import heapq
import itertools
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from broker.errors import BrokerError
from tests.chaos.federation import Federation, Kind, Member
from tests.support.frames import BODY
from tests.support.proxy import Direction, Proxy

__all__ = ["KINDS", "Done", "Fault", "Nemesis", "schedule"]

#: Every kind of fault, how often it is drawn, and how long it lasts (seconds, from and to; 0 for a moment).
KINDS: Mapping[str, tuple[int, float, float]] = {
    "kill active aggregator": (20, 0, 0),
    "kill standby": (7, 0, 0),
    "kill worker": (26, 0, 0),
    "stop active aggregator": (3, 12, 18),
    "stop worker": (2, 3, 16),
    "terminate active aggregator": (3, 0, 0),
    "terminate worker": (4, 0, 0),
    "cut aggregator": (5, 0, 0),
    "cut worker": (5, 0, 0),
    "cut aggregator in a frame": (4, 4, 8),
    "cut worker in a frame": (6, 4, 8),
    "hole before aggregator": (3, 3, 16),
    "hole before worker": (3, 3, 16),
    "delay": (2, 3, 8),
    "slice": (2, 3, 8),
    "kill broker": (2, 0, 0),
    "terminate broker": (1, 0, 0),
    "freeze broker": (1, 2, 15),
    "memory alarm": (1, 4, 12),
}
KILLS = frozenset({"kill active aggregator", "kill standby", "kill worker", "kill broker"})


@dataclass(frozen=True, slots=True)
class Fault:
    """One entry of the schedule."""

    number: int
    gap: float
    """Seconds since the one before."""
    kind: str
    seconds: float
    """How long it lasts."""
    aim: float
    """From 0 to 1: which of those who can be meant."""
    choice: float
    """From 0 to 1: direction, reset or end, one address or all."""
    pause: float
    """Seconds until what died is started again."""

    def __str__(self) -> str:
        lasts = f" for {self.seconds:.1f} s" if self.seconds else ""
        return f"#{self.number} {self.kind}{lasts}"


def schedule(seed: int, gap: float) -> Iterator[Fault]:
    """Faults without end, ``gap`` seconds apart on the average."""
    draw = random.Random(seed)
    names, weights = list(KINDS), [weight for weight, _, _ in KINDS.values()]
    for number in itertools.count(1):
        kind = draw.choices(names, weights)[0]
        _, least, most = KINDS[kind]
        yield Fault(
            number=number,
            gap=min(draw.expovariate(1 / gap), 5 * gap),
            kind=kind,
            seconds=round(draw.uniform(least, most), 1),
            aim=draw.random(),
            choice=draw.random(),
            # Mostly at once, so that killing goes on; sometimes as long as a person takes.
            pause=draw.choice((0.1, 0.3, 1.0, 4.0)),
        )


@dataclass(slots=True)
class Done:
    """A fault that was carried out."""

    fault: Fault
    target: str
    at: float
    """Seconds since 1970."""
    healed: float = 0.0
    """When its cause was gone: the process started again, the way free, the broker back."""


@dataclass(order=True)
class _Later:
    due: float
    order: int
    act: Callable[[], None] = field(compare=False)


class Nemesis:
    """Carries out a schedule. :meth:`turn` is called often, by one thread."""

    def __init__(self, federation: Federation, faults: Iterator[Fault], say: Callable[[str], None]) -> None:
        self.done: list[Done] = []
        self.missed: Counter[str] = Counter()
        self._federation = federation
        self._faults = faults
        self._say = say
        self._next = next(faults)
        self._due = time.monotonic() + self._next.gap
        self._later: list[_Later] = []
        self._order = itertools.count()
        self._dying: dict[Member, Done] = {}
        self._at_broker: threading.Thread | None = None

    @property
    def kills(self) -> int:
        """SIGKILLs so far."""
        return sum(done.fault.kind in KILLS for done in self.done)

    def turn(self, *, more: bool = True) -> None:
        """Whatever is due now; with ``more``, further faults too."""
        while self._later and self._later[0].due <= time.monotonic():
            heapq.heappop(self._later).act()
        for member in self._federation.bury():
            self._start_later(member)
        if more and time.monotonic() >= self._due:
            fault, self._next = self._next, next(self._faults)
            # From now, not from when it was due: after a busy moment they must not come all at once.
            self._due = time.monotonic() + self._next.gap
            self._strike(fault)

    @property
    def is_quiet(self) -> bool:
        """Whether nothing is left to be healed or started again."""
        busy = self._at_broker is not None and self._at_broker.is_alive()
        return not (busy or self._later or self._dying)

    # -------------------------------------------------------------------------------------------- striking

    def _strike(self, fault: Fault) -> None:
        what, _, whom = fault.kind.partition(" ")
        done: Done | None
        if whom == "broker" or fault.kind == "memory alarm":
            done = self._strike_broker(fault)
        elif what in {"kill", "terminate", "stop"}:
            done = self._strike_process(fault, what, self._aim(fault))
        else:
            done = self._strike_network(fault, what, self._aim(fault))
        if done is None:
            self.missed[fault.kind] += 1
            return
        self.done.append(done)
        self._say(f"{fault} → {done.target}")

    def _aim(self, fault: Fault) -> Member | None:
        members = [member for member in self._federation.members if member.is_alive]
        kind: Kind | None = next((kind for kind in ("aggregator", "worker") if kind in fault.kind), None)
        if "active" in fault.kind or fault.kind == "kill standby":
            leader = self._federation.leader()
            if "active" in fault.kind:
                return leader
            kind = "aggregator"
            members = [member for member in members if member is not leader]
        if kind is not None:
            members = [member for member in members if member.kind == kind]
        return members[int(fault.aim * len(members))] if members else None

    def _strike_process(self, fault: Fault, what: str, member: Member | None) -> Done | None:
        if member is None:
            return None
        done = Done(fault, member.name, time.time())
        if what == "stop":
            if not self._federation.freeze(member):
                return None
            self._heal_later(done, lambda: self._federation.go_on(member))
            return done
        number = signal.SIGKILL if what == "kill" else signal.SIGTERM
        if not self._federation.kill(member, number):
            return None
        self._dying[member] = done
        return done

    def _start_later(self, member: Member) -> None:
        done = self._dying.pop(member, None)

        def start() -> None:
            self._federation.start(member)
            if done is not None:
                done.healed = time.time()

        self._after(done.fault.pause if done is not None else 0.5, start)

    def _strike_network(self, fault: Fault, what: str, member: Member | None) -> Done | None:
        if member is None:
            return None
        number = int(fault.choice * 1000)
        proxies = member.proxies if number % 2 else [member.proxies[number // 2 % len(member.proxies)]]
        done = Done(fault, f"{member.name}, {len(proxies)} of {len(member.proxies)} addresses", time.time())
        for proxy in proxies:
            _disturb(proxy, what, fault, number)
        if what == "cut" and not fault.seconds:
            done.healed = done.at
        else:
            self._heal_later(done, lambda: _heal(proxies))
        return done

    def _strike_broker(self, fault: Fault) -> Done | None:
        if self._at_broker is not None and self._at_broker.is_alive():
            return None
        done = Done(fault, "broker", time.time())
        self._at_broker = threading.Thread(target=self._handle_broker, args=(fault, done), name="broker", daemon=True)
        self._at_broker.start()
        return done

    def _handle_broker(self, fault: Fault, done: Done) -> None:
        node, over = self._federation.node, threading.Event()
        with self._federation.at_node:
            try:
                match fault.kind:
                    case "kill broker":
                        node.kill()
                        over.wait(fault.pause)
                        node.start()
                    case "terminate broker":
                        node.restart()
                    case "freeze broker":
                        node.pause()
                        over.wait(fault.seconds)
                        node.resume()
                    case _:
                        node.ctl("set_vm_memory_high_watermark", "0.00001")
                        over.wait(fault.seconds)
                        node.ctl("set_vm_memory_high_watermark", "0.4")
            except BrokerError as error:
                self._federation.problems.append(f"{fault}: {error}")
            done.healed = time.time()

    # ----------------------------------------------------------------------------------------- and healing

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._later, _Later(time.monotonic() + seconds, next(self._order), act))

    def _heal_later(self, done: Done, heal: Callable[[], object]) -> None:
        def act() -> None:
            heal()
            done.healed = time.time()

        self._after(done.fault.seconds, act)


def _heal(proxies: Iterable[Proxy]) -> None:
    for proxy in proxies:
        proxy.heal()


def _disturb(proxy: Proxy, what: str, fault: Fault, number: int) -> None:
    match what:
        case "hole":
            proxy.hole(*([], [Direction.UP], [Direction.DOWN])[number % 3])
        case "delay":
            proxy.delay(0.02 + fault.choice / 4)
        case "slice":
            proxy.slices(1 + number % 97)
        case _ if fault.seconds:
            direction = Direction.DOWN if number % 3 == 0 else Direction.UP
            proxy.cut_in_frame(7 + number % 200, kind=BODY, direction=direction)
        case _:
            proxy.cut(reset=number % 4 != 0)
