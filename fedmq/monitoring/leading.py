"""What aggregators say of themselves (``aggregator.status``), read with care."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from fedmq.monitoring.text import clean, count, number, real, whole
from fedmq.monitoring.worker import MOST_REASONS

__all__ = ["DISK", "Leaders", "Status", "figures_of", "parsed"]

#: An aggregator that was not heard for so long is forgotten.
GONE_SECONDS = 300.0
MOST_AGGREGATORS = 20
STATES = ("running", "paused", "done")
#: Pages of workers in a status.
MOST_PAGES = 1000
#: What is known of the disk, and its word in a status.
DISK = {"checkpoints": "checkpoints", "bytes": "checkpoint_bytes", "free": "disk_free", "total": "disk_total"}


@dataclass(frozen=True, slots=True)
class Status:
    """What the active aggregator has said of the run, but for workers."""

    state: str = ""
    updates_per_second: float | None = None
    rounds_per_minute: float | None = None
    staleness: Mapping[str, float | None] | None = None
    applied: int | None = None
    rejected: Mapping[str, int] | None = None
    disk: Mapping[str, int | None] = field(default_factory=dict)
    pages: frozenset[int] = frozenset()
    """Which pages of workers have come since the watch began."""
    of: int = 0
    """How many there are."""

    @property
    def is_complete(self) -> bool:
        """Whether all pages have come."""
        return 0 < self.of <= len(self.pages)

    @classmethod
    def read(cls, data: Mapping[str, Any], before: Status | None) -> Status:
        """The status in ``data``, which came after ``before``."""
        page, pages = whole(data.get("page"), 0), min(whole(data.get("pages"), 1), MOST_PAGES)
        known = before.pages if before is not None and before.of == pages else frozenset[int]()
        return cls(
            state=state if (state := data.get("state")) in STATES else "running",
            updates_per_second=real(data.get("updates_per_second")),
            rounds_per_minute=real(data.get("rounds_per_minute")),
            staleness={name: real(data.get(f"staleness_{name}")) for name in ("median", "p95", "max")},
            applied=count(data.get("applied")),
            rejected=_counts(parsed(data.get("rejected"))),
            disk={name: count(data.get(word)) for name, word in DISK.items()},
            pages=known | {page} if 0 <= page < pages else known,
            of=pages,
        )


@dataclass(frozen=True, slots=True)
class Leader:
    """One aggregator, as it says."""

    active: bool
    epoch: int
    heard: float


class Leaders:
    """The aggregators of a run that were heard, the active one and those that stand by."""

    def __init__(self) -> None:
        """Nobody has been heard."""
        self._heard: dict[str, Leader] = {}

    def hear(self, data: Mapping[str, Any], now: float) -> str | None:
        """One has said ``data``; its name if it has left, and was here before."""
        name = clean(data.get("aggregator"))
        if data.get("leaves"):
            return name if self._heard.pop(name, None) is not None else None
        if name in self._heard or len(self._heard) < MOST_AGGREGATORS:
            self._heard[name] = Leader(bool(data.get("active")), whole(data.get("epoch"), 0), now)
        return None

    def forget(self, now: float) -> None:
        """Those that were not heard for long."""
        self._heard = {name: one for name, one in self._heard.items() if now - one.heard < GONE_SECONDS}

    def snapshot(self, told: tuple[tuple[str, bool], ...], now: float) -> list[dict[str, Any]]:
        """All, with those of whom only the broker has ``told``: name, and whether it is the active one."""
        found = {
            name: {
                "name": name,
                "active": one.active,
                "epoch": one.epoch if one.active else None,
                "seen_seconds": round(max(0.0, now - one.heard), 1),
            }
            for name, one in self._heard.items()
        }
        for name, active in told[:MOST_AGGREGATORS]:
            shown = clean(name)
            found.setdefault(shown, {"name": shown, "active": active, "epoch": None, "seen_seconds": None})
        return sorted(found.values(), key=lambda one: (not one["active"], str(one["name"])))


def figures_of(text: object) -> dict[str, float]:
    """Figures by name, as JSON; NaN where there is no number."""
    value = parsed(text)
    pairs = list(value.items())[:MOST_REASONS] if isinstance(value, Mapping) else []
    return {clean(name): math.nan if (found := number(one)) is None else found for name, one in pairs}


def parsed(text: object) -> Any:
    """What ``text`` says as JSON; None if it says nothing."""
    try:
        return json.loads(str(text))
    except (ValueError, RecursionError):
        return None


def _counts(value: object) -> dict[str, int]:
    pairs = list(value.items())[:MOST_REASONS] if isinstance(value, Mapping) else []
    return {clean(name): n for name, one in pairs if (n := count(one))}
