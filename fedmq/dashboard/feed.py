"""What browsers are told: everything once, and then what has changed, as server-sent events.

Each message is encoded once, whoever listens, and a ring keeps the last ones. A browser that comes back says what it
has seen last and goes on from there if the ring still has it; one that is new, slow, or was away for too long gets
everything again. So nobody waits for anybody, and memory is bounded.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import secrets
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Feed", "Picture", "change", "cleaned", "merge_patch"]

#: Seconds between two messages, at least.
INTERVAL = 0.5
#: Seconds after which a silent stream says that it is still there; that is how a dead browser is noticed.
ALIVE_SECONDS = 10.0
#: Messages in the ring.
KEPT = 30
#: Lines of the log that a browser is given at first, and keeps.
LOG_LINES = 300


@dataclass(frozen=True, slots=True)
class Picture:
    """A run at one moment, in values that JSON knows."""

    view: Mapping[str, Any] = field(default_factory=dict)
    """The view's words; workers and queues by name."""
    series: Mapping[str, Sequence[Sequence[float | None]]] = field(default_factory=dict)
    """Curves: points of (version, seconds since 1970, value)."""
    log: Sequence[Mapping[str, Any]] = ()
    """What happened, oldest first; ``number`` counts up."""


def cleaned(value: Any) -> Any:
    """``value`` in what JSON has: no NaN and no infinity, which become None, and text as keys."""
    if isinstance(value, Mapping):
        return {str(key): cleaned(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """What makes ``after`` of ``before``, as RFC 7396 has it: None takes a key away. Lists change as a whole."""
    found: dict[str, Any] = dict.fromkeys(before.keys() - after.keys())
    for key, value in after.items():
        if key not in before:
            found[key] = value
        elif isinstance(value, Mapping) and isinstance(before[key], Mapping):
            inner = merge_patch(before[key], value)
            if inner:
                found[key] = inner
        elif before[key] != value:
            found[key] = value
    return found


def change(before: Picture, after: Picture) -> dict[str, Any]:
    """What a browser that has ``before`` needs to have ``after``; parts that are as they were are left out.

    ``series`` gives for each curve that has changed how many of its points stay, and those that follow them.
    """
    told: dict[str, Any] = {}
    view = merge_patch(before.view, after.view)
    if view:
        told["view"] = view
    series: dict[str, Any] = {}
    for name, points in after.series.items():
        known = before.series.get(name, ())
        kept = _common(known, points)
        if name not in before.series or kept < max(len(points), len(known)):
            series[name] = {"keep": kept, "points": list(points[kept:])}
    series.update(dict.fromkeys(before.series.keys() - after.series.keys()))
    if series:
        told["series"] = series
    last = before.log[-1]["number"] if before.log else -1
    log = [line for line in after.log if line["number"] > last]
    if log:
        told["log"] = log[-LOG_LINES:]
    return told


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """How many items both begin with."""
    pairs = zip(one, other, strict=False)
    return next((place for place, (left, right) in enumerate(pairs) if left != right), min(len(one), len(other)))


class Feed:
    """Looks at a run twice a second while anybody listens, and tells those who do."""

    def __init__(self, look: Callable[[], Picture], *, interval: float = INTERVAL, life: str | None = None) -> None:
        """``look`` may take a moment: it is called on another thread. ``life`` tells this feed from one before."""
        self._look = look
        self._interval = interval
        self._life = life or secrets.token_hex(4)
        self._picture = Picture()
        self._number = 0
        self._ring: deque[tuple[int, bytes]] = deque(maxlen=KEPT)
        self._changed = asyncio.Event()
        self._wanted = asyncio.Event()
        self._closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ending = asyncio.Event()
        self._looking = asyncio.Lock()
        self.listeners = 0
        """Open streams."""

    async def run(self) -> None:
        """Look again and again, until :meth:`close`."""
        self._loop = asyncio.get_running_loop()
        try:
            while not self._ending.is_set():
                await self._wanted.wait()
                await self._tick()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._ending.wait(), self._interval)
                if not self.listeners and not self._ending.is_set():
                    self._wanted.clear()
            await self._tick()
        finally:
            self._closed = True
            self._wake()

    def close(self) -> None:
        """Tell everybody how it stands at the end, and end their streams. From any thread; may be called again."""
        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._close)

    async def whole(self) -> bytes:
        """Everything, as JSON."""
        await self._tick()
        return _json(self._everything())

    async def stream(self, seen: str = "") -> AsyncGenerator[bytes, None]:
        """Server-sent events for one browser, whose last message was ``seen``."""
        self.listeners += 1
        try:
            if not self._wanted.is_set():
                # What is known is as old as the last listener.
                await self._tick()
                self._wanted.set()
            place = self._place(seen)
            yield b"retry: 1000\n\n"
            while True:
                changed = self._changed
                # One message and then another look: while a slow browser takes it, the ring moves on.
                if place is None or (place < self._number and self._ring[0][0] > place + 1):
                    place = self._number
                    yield self._message("whole", self._everything())
                    continue
                if place < self._number:
                    place += 1
                    yield self._ring[place - self._ring[0][0]][1]
                    continue
                if self._closed:
                    return
                try:
                    await asyncio.wait_for(changed.wait(), ALIVE_SECONDS)
                except TimeoutError:
                    yield b"event: alive\ndata: 1\n\n"
        finally:
            self.listeners -= 1

    async def _tick(self) -> None:
        """Look, and put into the ring what is new."""
        async with self._looking:
            picture = await asyncio.to_thread(self._look)
            told = change(self._picture, picture)
            if told:
                self._picture = picture
                self._number += 1
                self._ring.append((self._number, self._message("change", told)))
                self._wake()

    def _wake(self) -> None:
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def _close(self) -> None:
        self._ending.set()
        self._wanted.set()

    def _place(self, seen: str) -> int | None:
        """The number of the message ``seen``; None if that is none that can be gone on from."""
        life, _, number = seen.partition("-")
        if life != self._life or not number.isdecimal() or len(number) > 15 or int(number) > self._number:
            return None
        return int(number)

    def _everything(self) -> dict[str, Any]:
        picture = self._picture
        return {"view": picture.view, "series": picture.series, "log": list(picture.log[-LOG_LINES:])}

    def _message(self, kind: str, data: Mapping[str, Any]) -> bytes:
        # JSON on one line: a line's end in a text is escaped there.
        return b"id: %s-%d\nevent: %s\ndata: %s\n\n" % (self._life.encode(), self._number, kind.encode(), _json(data))


def _json(value: Any) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
