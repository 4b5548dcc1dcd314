"""A round machine with a shell that does everything at once: for tests that only care for the numbers."""

from __future__ import annotations

from typing import Any

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.machine import RoundMachine
from aggregator.core.rules import Rules
from aggregator.core.snapshot import Snapshot, VersionRecord
from broker.messages import Goodbye, Hello, Reason, Role, Update
from broker.transport import Token
from tests.support.builders import RUN


class Driver:
    """Feeds events, writes every checkpoint at once, remembers what came out."""

    def __init__(self, rules: Rules, snapshot: Snapshot, now: float = 0.0) -> None:
        self.machine = RoundMachine(rules, snapshot, now)
        self.now = now
        self.disk = snapshot
        self.acked: list[Token] = []
        self.rejected: list[tuple[Token, Reason]] = []
        self.broadcasts: list[do.Broadcast] = []
        self.records: list[VersionRecord] = []
        self.facts: list[do.Fact] = []
        self.told: list[do.Tell] = []
        self.endings: list[str] = []
        self.wake_at: float | None = None
        self._tag = 0
        self.send(on.LinkUp(1))

    def send(self, event: on.Happening) -> None:
        for effect in self.machine.handle(event, self.now):
            match effect:
                case do.WriteCheckpoint(commit, snapshot):
                    self.disk = snapshot
                    self.send(on.CheckpointWritten(commit))
                case do.Ack(token):
                    self.acked.append(token)
                case do.Reject(token, reason, _):
                    self.rejected.append((token, reason))
                case do.Broadcast():
                    self.broadcasts.append(effect)
                case do.Record(fact):
                    self.facts.append(fact)
                    if isinstance(fact, do.VersionMade):
                        self.records.append(fact.record)
                case do.Tell():
                    self.told.append(effect)
                case do.Finish(reason):
                    self.endings.append(reason)
                case do.WakeAt(time):
                    self.wake_at = time

    def update(self, update: Update) -> Token:
        self._tag += 1
        token = Token(1, self._tag)
        self.send(on.Arrived(token, update, 100))
        return token

    def hello(self, *workers: str, role: Role = Role.TRAINER) -> None:
        for worker in workers:
            self.send(on.Joined(Hello(run=RUN, worker=worker, incarnation="i", role=role)))

    def goodbye(self, worker: str, confirmed: int = 0) -> None:
        self.send(on.Left(Goodbye(run=RUN, worker=worker, incarnation="i", confirmed=confirmed)))

    def tick(self, seconds: float) -> None:
        self.now += seconds
        self.send(on.Tick())

    @property
    def parameters(self) -> Any:
        return self.machine.parameters

    @property
    def reasons(self) -> list[Reason]:
        return [reason for _, reason in self.rejected]
