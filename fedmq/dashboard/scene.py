"""What the page shows: what is heard of the run now, and what its folder tells of before."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import itemgetter
from typing import Any, Protocol

from aggregator.tally import Tally
from broker.messages import Reason, Role
from fedmq.dashboard.feed import Picture, cleaned
from fedmq.dashboard.past import MOST_METRICS, Past, curve
from fedmq.monitoring.curve import Curve
from fedmq.monitoring.log import Entry

__all__ = ["Scene", "Watched", "following"]

NOTE_SECONDS = 1.0
LOG_LINES = 500

#: The curves of versions in the view's series, and what they are called here.
OF_VERSIONS = ("loss", "seconds", "staleness")

Point = Sequence[float | None]


class Watched(Protocol):
    """What is asked of :class:`fedmq.monitoring.monitor.Monitor`."""

    def now(self) -> float:
        """Seconds since 1970."""

    def snapshot(self) -> dict[str, Any]:
        """The view's words."""

    def series(self) -> dict[str, dict[str, list[Any]]]:
        """Curves, as columns."""

    def log(self, since: int = 0) -> list[Entry]:
        """What happened after the entry with this number."""


class Scene:
    """Puts a picture together whenever it is asked to. Any thread may call it."""

    def __init__(self, watched: Watched, past: Past | None = None) -> None:
        """Read the folder, which may take seconds if the history is long."""
        self._watched = watched
        self._past = past
        self._began = watched.now()
        self._log: deque[dict[str, Any]] = deque(maxlen=LOG_LINES)
        self._count = 0
        self._heard = 0
        """The number of the watched log's last line that is in ours."""
        self._told = (0.0, "", "", "")
        self._contributions: Mapping[str, float] = {}
        self._outcome = ""
        self._waiting: dict[str, Curve] = {"waiting": curve(), "dead": curve()}
        self._lock = threading.Lock()
        self.note()

    def note(self) -> None:
        """Take in what is new in the folder, and how long the queues are: about once a second."""
        snapshot = self._watched.snapshot()
        with self._lock:
            if self._past is not None:
                self._past.read()
                self._contributions = self._past.contributions()
                self._outcome = self._past.outcome()
            for queue in snapshot["queues"]:
                if queue["purpose"] == "updates" and queue["ready"] is not None:
                    self._waiting["waiting"].add(snapshot["version"], snapshot["time"], queue["ready"])
            if snapshot["dead_letters"] is not None:
                self._waiting["dead"].add(snapshot["version"], snapshot["time"], snapshot["dead_letters"])

    def look(self) -> Picture:
        """The run as it is now."""
        snapshot, series = self._watched.snapshot(), self._watched.series()
        entries = self._watched.log(self._heard)
        with self._lock:
            self._add_log(entries, is_heard=snapshot["heard_seconds"] is not None)
            view = self._completed(snapshot)
            view["workers"] = {worker["name"]: worker for worker in view["workers"]}
            view["queues"] = {queue["name"]: queue for queue in view["queues"]}
            return Picture(cleaned(view), cleaned(self._series(series)), list(self._log))

    # ---------------------------------------------------------------------------------------------- log

    def _add_log(self, entries: Sequence[Entry], *, is_heard: bool) -> None:
        """What the folder tells of the time since the watch began is left out if it is heard as well."""
        for time, level, kind, text in self._fresh_lines():
            if time < self._began or not is_heard:
                self._append(time=time, level=level, kind=kind, text=text)
        for entry in entries:
            if entry.number > self._heard:
                self._heard = entry.number
                self._append(time=entry.time, level=entry.level, kind=entry.kind, text=entry.text)

    def _append(self, **line: Any) -> None:
        self._count += 1
        self._log.append({"number": self._count, **line})

    def _fresh_lines(self) -> list[tuple[float, str, str, str]]:
        if self._past is None or not self._past.lines:
            return []
        found = list(self._past.lines)
        self._past.lines.clear()
        return found

    # ------------------------------------------------------------------------------------------- figures

    def _completed(self, view: dict[str, Any]) -> dict[str, Any]:
        """``view``, with what only the folder knows."""
        past = self._past
        for worker in view["workers"]:
            worker["contribution"] = self._contributions.get(worker["name"], worker["contribution"])
        if past is None:
            return view
        if past.problem:
            view["missing"].append(past.problem)
        if view["evaluation"]["version"] is None and past.evaluated >= 0:
            view["evaluation"] = {"version": past.evaluated, "metrics": past.metrics}
        if view["loss"] is None:
            view["loss"] = past.loss
        known = {worker["name"]: worker for worker in view["workers"]}
        for name, tally in past.tallies.items():
            if name in known and known[name]["updates"] is None:
                known[name]["updates"] = tally.updates
        if view["heard_seconds"] is None and past.version:
            view["version"], view["epoch"] = past.version, past.epoch
            view["state"] = "done" if self._outcome == "done" else view["state"]
            view["missing"] = [f"nothing is heard of this run now: what stands here is from {past.folder}"]
            absent = (past.tallies.keys() | past.rejected.keys()) - known.keys()
            view["workers"] += [_absent(name, past, self._contributions.get(name)) for name in sorted(absent)]
            view["rejected"] = dict(sum(past.rejected.values(), Counter()))
        return view

    # -------------------------------------------------------------------------------------------- curves

    def _series(self, live: Mapping[str, Mapping[str, Sequence[Any]]]) -> dict[str, list[Point]]:
        """The folder's curves, gone on with where the folder does not know yet."""
        found: dict[str, list[Point]] = {}
        if self._past is not None:
            found = {name: _points(curve.columns()) for name, curve in self._past.curves.items()}
        for name, points in _heard(live):
            before = found.get(name, [])
            last = before[-1][0] if before else None
            found[name] = before + [point for point in points if last is None or (point[0] or 0) > last]
        for name, waiting in self._waiting.items():
            if len(waiting):
                found[name] = _points(waiting.columns())
        return found


def _absent(name: str, past: Past, contribution: float | None) -> dict[str, Any]:
    """A worker of which only the folder tells, as the view would have it."""
    tally, rejected = past.tallies.get(name, Tally()), past.rejected.get(name, Counter())
    bad = {reason: times for reason, times in rejected.items() if reason != Reason.RUN_DONE}
    return {
        "name": name,
        "role": Role.TRAINER.value,
        "state": "",
        "seen_seconds": None,
        "version": tally.newest or None,
        "updates": tally.updates,
        "sent": None,
        "seconds": None,
        "pace": tally.mean("pace"),
        "staleness": tally.mean("staleness"),
        "loss": None,
        "rejected": dict(rejected),
        "score": None,
        "quarantined_until": None,
        "cosine": tally.mean("cosine"),
        "contribution": contribution,
        "remarks": [f"{sum(bad.values())} rejected: {', '.join(sorted(bad))}"] if bad else [],
    }


def _heard(live: Mapping[str, Mapping[str, Sequence[Any]]]) -> Iterator[tuple[str, list[Point]]]:
    versions, evaluations = live["versions"], live["evaluations"]
    for name in OF_VERSIONS:
        points = _points({"version": versions["version"], "time": versions["time"], "value": versions[name]})
        if points:
            yield name, points
    names = dict.fromkeys(name for metrics in evaluations["metrics"] for name in metrics)
    for name in list(names)[:MOST_METRICS]:
        values = [metrics.get(name) for metrics in evaluations["metrics"]]
        yield f"held:{name}", _points({**evaluations, "value": values})


def _points(columns: Mapping[str, Sequence[Any]]) -> list[Point]:
    """In the order of versions, in which evaluations need not come."""
    points = zip(columns["version"], columns["time"], columns["value"], strict=True)
    return sorted(map(list, points), key=itemgetter(0))


@contextmanager
def following(scene: Scene) -> Iterator[Scene]:
    """Have ``scene`` note what is new, on a thread, until the block is left."""
    stop = threading.Event()

    def note() -> None:
        while not stop.wait(NOTE_SECONDS):
            scene.note()

    thread = threading.Thread(target=note, name="dashboard-notes", daemon=True)
    thread.start()
    try:
        yield scene
    finally:
        stop.set()
        thread.join()
