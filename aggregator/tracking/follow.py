"""Follows a run's history and hands its numbers to a tracker, on a thread of its own.

The history is the queue: it is on disk, it is complete, and nobody waits for whoever reads it. A tracker that fails or
hangs holds up nothing and loses nothing: how far it has come stands in ``tracking/<name>.json`` of the run's folder.
From there it goes on, after a pause, after a restart, under another aggregator, or by ``fedmq track``.
"""

from __future__ import annotations

import json
import logging
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aggregator.disk import replace_file
from aggregator.tracking.base import Place, Point, Tracker
from aggregator.tracking.scalars import point_of
from broker.jsontext import from_json
from broker.seldom import Seldom

__all__ = ["Follower", "follow", "tracking"]

log = logging.getLogger("fedmq.tracking")

#: Seconds between two looks at the history.
LOOK_SECONDS = 1.0
#: Bytes of the history that are handed over at once.
PIECE = 1 << 20
#: After a failure it is tried again after so many seconds, then after twice as many, up to the most.
RETRY_SECONDS, MOST_RETRY_SECONDS = 2.0, 120.0
#: How often one piece is tried before it is left out: it may be the piece that the tracker cannot take.
MOST_TRIES = 5
#: How long an aggregator that leaves waits for trackers that are behind.
LEAVE_SECONDS = 5.0

Opens = Callable[[Place], Tracker]


@dataclass(slots=True)
class _State:
    """How far a tracker has come."""

    offset: int = 0
    """Bytes of the history."""
    newest: int = 0
    """Version."""
    rejected: Counter[str] = field(default_factory=Counter)
    left_out: int = 0
    """Lines that the tracker could not take."""


class Follower:
    """One tracker, and how far it has come."""

    def __init__(self, name: str, opens: Opens, *, run: str, folder: Path, settings: Mapping[str, Any]) -> None:
        """Nothing is opened yet."""
        self.name = name
        self._opens = opens
        self._place = (run, folder, settings)
        self._history = folder / "history.jsonl"
        self._file = folder / "tracking" / f"{re.sub(r'[^A-Za-z0-9_-]', '-', name)}.json"
        self._state = _read(self._file)
        self._tracker: Tracker | None = None
        self._tries = 0

    @property
    def left_out(self) -> int:
        """Lines of the history that the tracker could not take."""
        return self._state.left_out

    def step(self) -> int:
        """Hand over what is new, a piece of it at most; how many lines that were.

        Raises whatever the tracker raises. Then nothing is lost: the piece comes again, unless it has often.
        """
        lines, end = self._new_lines()
        if not lines:
            return 0
        state = _State(end, self._state.newest, self._state.rejected.copy(), self._state.left_out)
        points = list(_points(lines, state))
        try:
            if points:
                self._open().track(points)
        except Exception:
            self._tries += 1
            self.close()
            if self._tries < MOST_TRIES:
                raise
            state.left_out += len(lines)
            log.warning("%s does not take %d lines of the history, which are left out", self.name, len(lines))
        self._tries = 0
        self._state = state
        self._save()
        return len(lines)

    def close(self) -> None:
        """Close the tracker; it is opened again when there is something for it."""
        tracker, self._tracker = self._tracker, None
        if tracker is not None:
            try:
                tracker.close()
            except Exception as error:  # noqa: BLE001 - whatever it is, it concerns a tracker only
                log.debug("%s was not closed: %s", self.name, error)

    def _open(self) -> Tracker:
        if self._tracker is None:
            run, folder, settings = self._place
            self._tracker = self._opens(Place(run, folder, settings, self._state.newest))
        return self._tracker

    def _new_lines(self) -> tuple[list[Mapping[str, Any]], int]:
        """Whole lines from where it stands, and where they end."""
        try:
            with self._history.open("rb") as file:
                size = file.seek(0, 2)
                if size < self._state.offset:
                    # Another file, as from a backup: what it has was tracked before, and so was what it lacks.
                    self._state.offset = size
                    self._save()
                start = self._state.offset
                file.seek(start)
                content = file.read(PIECE)
                if b"\n" not in content:
                    content += file.readline()
        except FileNotFoundError:
            return [], 0
        end = content.rfind(b"\n") + 1
        lines: list[Mapping[str, Any]] = []
        for text in content[:end].splitlines():
            try:
                line = from_json(text)
            except ValueError:
                line = None
            lines.append(line if isinstance(line, dict) else {})
        return lines, start + end

    def _save(self) -> None:
        state = self._state
        text = json.dumps(
            {
                "offset": state.offset,
                "newest": state.newest,
                "rejected": dict(state.rejected),
                "left_out": state.left_out,
            }
        )
        self._file.parent.mkdir(exist_ok=True)
        replace_file(self._file, lambda file: file.write(text.encode()))


def _read(file: Path) -> _State:
    """What stands in ``file``; the beginning, if there is none or it is damaged."""
    try:
        found = from_json(file.read_text())
        return _State(
            int(found["offset"]), int(found["newest"]), Counter(found["rejected"]), int(found.get("left_out", 0))
        )
    except (OSError, ValueError, KeyError, TypeError):
        return _State()


def _points(lines: Sequence[Mapping[str, Any]], state: _State) -> Iterator[Point]:
    for line in lines:
        version = line.get("version")
        if line.get("kind") == "version" and isinstance(version, int):
            if version <= state.newest:  # an aggregator that hung may tell what its successor has told
                continue
            state.newest = version
        if (point := point_of(line, state.rejected)) is not None:
            yield point


def follow(follower: Follower, leave: threading.Event, leads: Callable[[], bool]) -> None:
    """Go on until ``leave`` is set and nothing is new. While another aggregator leads, it is that one that tracks.

    Raises nothing.
    """
    seldom, pause = Seldom(600.0), RETRY_SECONDS
    while True:
        leaving = leave.is_set()
        try:
            if leads() and follower.step():
                pause = RETRY_SECONDS
                continue
        except Exception as error:  # noqa: BLE001 - whatever it is, it concerns a tracker only
            if seldom.may(type(error).__name__):
                log.warning("%s is behind: %s: %s; trying again", follower.name, type(error).__name__, error)
            if leaving:
                return
            leave.wait(pause)
            pause = min(2 * pause, MOST_RETRY_SECONDS)
            continue
        if leaving:
            follower.close()
            return
        leave.wait(LOOK_SECONDS)


@contextmanager
def tracking(
    trackers: Mapping[str, Opens],
    *,
    run: str,
    folder: Path,
    settings: Mapping[str, Any],
    leads: Callable[[], bool],
) -> Iterator[None]:
    """Within the block, hand the run's numbers to ``trackers``, each on a thread of its own.

    ``leads`` says whether this process leads the run. Whoever is behind at the end gets ``LEAVE_SECONDS``.

    Raises:
        ConfigError: what a tracker needs is not installed.
    """
    for opens in trackers.values():
        getattr(opens, "require", lambda: None)()
    followers = [Follower(name, opens, run=run, folder=folder, settings=settings) for name, opens in trackers.items()]
    leave = threading.Event()
    threads = [
        # As daemons: one that hangs must not keep the process.
        threading.Thread(target=follow, args=(follower, leave, leads), name=f"track-{follower.name}", daemon=True)
        for follower in followers
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        leave.set()
        deadline = time.monotonic() + LEAVE_SECONDS
        for follower, thread in zip(followers, threads, strict=True):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                log.warning("%s is behind; 'fedmq track %s --run %s' goes on", follower.name, follower.name, run)
