"""What operators ask of a running run, until it is durable and in force. Part of the round machine's state."""

from __future__ import annotations

from dataclasses import dataclass, field

from aggregator.core.rules import Rules
from aggregator.core.snapshot import Changes, Snapshot
from broker.transport import Token

__all__ = ["Controls", "Order"]

#: Ids of executed commands that are remembered; one that comes again is of the last minutes.
MAX_COMMANDS = 100


@dataclass(frozen=True, slots=True)
class Order:
    """Rules that are to be in force from the next round on, and the changes that make them."""

    changes: Changes
    rules: Rules


@dataclass(slots=True)
class Controls:
    """Changes in force and to come, whether the run is paused, and commands that are not yet durable."""

    changes: Changes
    pending: Order | None
    paused: bool
    commands: tuple[str, ...]
    held: dict[str, list[Token]] = field(default_factory=dict)
    """Tokens of commands that the next commit will make durable."""

    @classmethod
    def of(cls, snapshot: Snapshot, pending: Rules | None) -> Controls:
        """As a checkpoint has them; ``pending`` are the rules that ``snapshot.pending`` makes."""
        order = Order(snapshot.pending, pending) if snapshot.pending is not None and pending is not None else None
        return cls(snapshot.changes, order, snapshot.paused, snapshot.commands)

    @property
    def newest(self) -> Changes:
        """All changes, in force or to come: what a further change adds to."""
        return self.changes if self.pending is None else self.pending.changes

    def knows(self, command: str) -> bool:
        """Whether ``command`` was executed."""
        return command in self.commands

    def hold(self, command: str, token: Token) -> None:
        """``command`` is executed; its message is acknowledged when that is durable."""
        self.held[command] = [token]
        self.commands = (*self.commands, command)[-MAX_COMMANDS:]

    def forget(self, generation: int) -> None:
        """The connection of ``generation`` is gone."""
        for command, tokens in self.held.items():
            self.held[command] = [token for token in tokens if token.generation != generation]
