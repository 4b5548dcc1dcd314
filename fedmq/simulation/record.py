"""What is measured while a scenario goes on."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Point", "Result"]


@dataclass(frozen=True, slots=True)
class Point:
    """A version that was evaluated."""

    seconds: float
    version: int
    updates: int
    """In the model."""
    bytes_up: int
    """That workers have sent, what was lost or refused included."""
    bytes_down: int
    """That workers have taken."""
    metrics: dict[str, float]


@dataclass(slots=True, kw_only=True)
class Result:
    """What came of a scenario."""

    name: str
    seed: int
    metric: str
    target: float | None
    grows: bool = False
    """Whether more of the metric is better."""
    ended: str = ""
    """Why: ``updates``, ``versions``, ``seconds``, ``target`` or ``trace``."""
    seconds: float = 0.0
    """Virtual."""
    versions: int = 0
    updates: int = 0
    """That count, those in the buffer included."""
    published: int = 0
    """Updates that workers have made."""
    deliveries: int = 0
    """Updates that the broker took, repeated ones included."""
    repeated: int = 0
    """Of those, the ones that counted already."""
    events: int = 0
    """Things that happened in virtual time."""
    crashes: int = 0
    left: int = 0
    """Workers that disappeared."""
    bytes_up: int = 0
    bytes_down: int = 0
    digest: str = ""
    """Of the parameters at the end."""
    staleness: Counter[int] = field(default_factory=Counter)
    """Updates in the model by their staleness."""
    rejected: Counter[str] = field(default_factory=Counter)
    """Refused updates, by reason."""
    warnings: Counter[str] = field(default_factory=Counter)
    """What the aggregator would have told its operator."""
    points: list[Point] = field(default_factory=list)
    reached: Point | None = None
    """The first one at which the target was reached."""

    def plain(self) -> dict[str, Any]:
        """As JSON knows it."""
        names = [name for name in self.__slots__ if name not in ("points", "reached")]
        values = {name: getattr(self, name) for name in names}
        for name in ("staleness", "rejected", "warnings"):
            values[name] = {str(key): count for key, count in sorted(values[name].items())}
        return {**values, "points": [_plain(p) for p in self.points], "reached": self.reached and _plain(self.reached)}


def _plain(point: Point) -> dict[str, Any]:
    return {name: getattr(point, name) for name in point.__slots__}
