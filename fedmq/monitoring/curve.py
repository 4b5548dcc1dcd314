"""A curve of a run that may go on for months, in room for a fixed number of points."""

from __future__ import annotations

from typing import Any

__all__ = ["Curve"]


class Curve:
    """Points in the order in which they came; when the room is used up, every second one goes.

    So the whole run is always there, ever coarser, and its newest point exactly.
    """

    def __init__(self, names: tuple[str, ...], room: int = 1000) -> None:
        """``names`` are a point's fields; ``room`` is the most points that are kept, an even number."""
        self.names = names
        self._room = room
        self._every = 1
        self._seen = 0
        self._points: list[tuple[Any, ...]] = []
        self._newest: tuple[Any, ...] | None = None

    def __len__(self) -> int:
        return len(self._points)

    def add(self, *point: Any) -> None:
        """One more point, with a value for each of the names."""
        self._newest = point
        if self._seen % self._every == 0:
            if len(self._points) == self._room:
                del self._points[1::2]
                self._every *= 2
            if self._seen % self._every == 0:
                self._points.append(point)
        self._seen += 1

    def columns(self) -> dict[str, list[Any]]:
        """The values by name, oldest first; the newest point is always the last."""
        points = self._points
        if self._newest is not None and points[-1] is not self._newest:
            points = [*points, self._newest]
        return {name: [point[index] for point in points] for index, name in enumerate(self.names)}
