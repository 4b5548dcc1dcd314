"""Policies for the queues of all runs, as data: optional, since what a run needs is declared with its queues."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["DEAD_BYTES", "UPDATE_BYTES", "Policy", "policies"]

UPDATE_BYTES = 2_000_000_000
DEAD_BYTES = 1_000_000_000
#: Of events and notices that wait for somebody who listens; they are small, and lossy on purpose.
LISTENER_BYTES = 64_000_000


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy. RabbitMQ keeps no description of it, so its name has to say what it does."""

    name: str
    pattern: str
    definition: Mapping[str, str | int]
    why: str
    priority: int = 0

    def body(self) -> dict[str, Any]:
        """What the management API takes at ``/policies/VHOST/NAME``."""
        return {
            "pattern": self.pattern,
            "definition": dict(self.definition),
            "priority": self.priority,
            "apply-to": "queues",
        }

    def entry(self, vhost: str) -> dict[str, Any]:
        """As one of ``policies`` in a definitions file, which RabbitMQ imports."""
        return {"vhost": vhost, "name": self.name, **self.body()}

    def command(self, vhost: str) -> str:
        """The command for it, for a POSIX shell."""
        words = ["rabbitmqctl", "set_policy", "-p", vhost, self.name, self.pattern, json.dumps(dict(self.definition))]
        return shlex.join([*words, "--apply-to", "queues"])


def policies(*, update_bytes: int = UPDATE_BYTES, dead_bytes: int = DEAD_BYTES) -> tuple[Policy, ...]:
    """Bounds for what grows when nobody looks: the backlog of each run, and its dead letters."""
    return (
        Policy(
            "fedmq-updates-wait-when-full",
            r"^fedmq\.[^.]+\.updates$",
            {"max-length-bytes": update_bytes, "overflow": "reject-publish"},
            f"updates of a run that wait for its aggregator take {update_bytes:,} bytes at most; workers wait then",
        ),
        Policy(
            "fedmq-dead-letters-oldest-go",
            r"^fedmq\.[^.]+\.dead$",
            {"max-length-bytes": dead_bytes, "overflow": "drop-head"},
            f"dead letters of a run take {dead_bytes:,} bytes at most; the oldest are dropped then",
        ),
        Policy(
            "fedmq-listeners-oldest-go",
            r"^fedmq\.[^.]+\.(events|notice|watch)\..+$",
            {"max-length-bytes": LISTENER_BYTES, "overflow": "drop-head"},
            f"events and notices wait in {LISTENER_BYTES:,} bytes at most for each who listens; the oldest are dropped "
            "then",
        ),
    )
