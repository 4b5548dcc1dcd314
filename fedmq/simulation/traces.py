"""Trainings that have happened, as a scenario's workers: from a production run's history, or from a CSV file.

The history tells when each version came to be, and of each update which version it started from and in which order
they came. So an update starts just after its base version, and arrives between the version before its own and its own.
Whoever simulates the same rules gets the same rounds, with the same staleness; with other rules the same workers
take, at the same moments, whatever version is the newest then.
"""

from __future__ import annotations

import csv
import heapq
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from aggregator.core import events as on
from aggregator.core.snapshot import VersionRecord
from aggregator.history import read_history, version_record
from broker.errors import ConfigError, FedmqError
from broker.messages import Hello, Parameters
from broker.topology import check_name
from fedmq.simulation.author import LIFE, Author
from fedmq.simulation.clock import NEVER, ticks
from fedmq.simulation.crew import Host
from fedmq.simulation.scenario import Scenario
from fedmq.simulation.shelf import Shelf

__all__ = ["Job", "Trace", "TraceCrew", "load_trace"]


@dataclass(frozen=True, slots=True, order=True)
class Job:
    """One training."""

    start: int
    """Microseconds."""
    end: int
    """When its update arrives."""
    worker: int


@dataclass(frozen=True, slots=True)
class Trace:
    """What happened."""

    names: list[str]
    """Of the workers, sorted."""
    jobs: list[Job]
    """In the order in which they started."""


def load_trace(path: Path) -> Trace:
    """The trace in a run's folder, or in a CSV file with the columns worker, start and end (in seconds).

    Raises :class:`ConfigError` if there is none, or none that makes sense.
    """
    file = path / "history.jsonl" if path.is_dir() else path
    if not file.exists():
        raise ConfigError(f"population.trace: there is no {file}: name a run's folder, like runs/digits, or a CSV file")
    try:
        rows = list(_from_history(file) if path.is_dir() else _from_csv(file))
    except OSError as error:
        raise ConfigError(f"population.trace: {file} cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"population.trace: {file} is no text") from None
    except FedmqError as error:
        raise ConfigError(f"population.trace: {error}") from None
    if not rows:
        raise ConfigError(f"population.trace: {file} tells of no update")
    names = sorted({name for name, _, _ in rows})
    numbers = {name: number for number, name in enumerate(names)}
    return Trace(names, sorted(Job(start, end, numbers[name]) for name, start, end in rows))


def _from_csv(file: Path) -> Iterator[tuple[str, int, int]]:
    with file.open(newline="", encoding="utf-8-sig") as handle:  # spreadsheets put a mark at the beginning
        for number, row in enumerate(csv.DictReader(handle), 2):
            try:
                start, end = float(row["start"]), float(row["end"])
                if not 0 <= start < end < NEVER / 1e6:
                    raise ValueError("start and end must be seconds from 0, and the end later")
                yield check_name("worker", row["worker"]), ticks(start), max(ticks(start) + 1, ticks(end))
            except (KeyError, TypeError, ValueError, ConfigError) as error:
                what = f"no column {error}" if isinstance(error, KeyError) else error
                raise ConfigError(f"{file}, line {number}: {what}") from None


def _from_history(file: Path) -> Iterator[tuple[str, int, int]]:
    records = [version_record(line) for line in read_history(file) if line.get("kind") == "version"]
    if not records:
        return
    origin = records[0].time - records[0].seconds
    made: dict[int, int] = {records[0].version - 1: 0}
    before = 0
    for record in records:
        entries = record.updates or record.dropped
        # Room for each update at a moment of its own, the first one two later than the version before.
        now = max(ticks(max(0.0, record.time - origin)), before + 2 * len(entries) + 2)
        for place, entry in enumerate(entries, 1):
            start = _start(made, entry.base_version, record)
            arrival = before + (now - before) * place // len(entries)
            yield entry.id.worker, start + 1, max(arrival, start + 2)
        made[record.version] = before = now


def _start(made: Mapping[int, int], base: int, record: VersionRecord) -> int:
    """When version ``base`` was made; of one that was left out in the history, the one before it."""
    known = [version for version in made if version <= base]
    if base >= record.version:
        raise ConfigError(f"version {record.version} has an update that starts from version {base}")
    return made[base] if base in made else made[max(known)] if known else 0


class TraceCrew:
    """Workers who train when the trace says so, whatever the plan allows: it is a fact that they did."""

    def __init__(self, scenario: Scenario, trace: Trace, author: Author, host: Host) -> None:
        self.due = NEVER
        self._run, self._author, self._host = scenario.run.name, author, host
        self._jobs = iter(trace.jobs)
        self._next: Job | None = next(self._jobs, None)
        # End, order, worker, base version.
        self._ends: list[tuple[int, int, int, int]] = []
        self._order = 0
        self._shelf = Shelf()
        self._trained: dict[int, Counter[int]] = {}
        self._told: dict[int, int] = {}

    @property
    def is_over(self) -> bool:
        """As :class:`Workers`."""
        return self._next is None and not self._ends

    @property
    def here(self) -> int:
        """As :class:`Workers`."""
        return len(self._author.names)

    def begin(self) -> None:
        """As :class:`Workers`."""
        for name in self._author.names:
            self._host.tell(on.Joined(Hello(run=self._run, worker=name, incarnation=LIFE)), 0)
        self._look_ahead()

    def reach(self, base: Parameters, now: int) -> None:
        """As :class:`Workers`."""
        del now
        self._shelf.put(base)

    def step(self, now: int) -> None:
        """As :class:`Workers`: what ends comes before what starts."""
        if self._ends and self._ends[0][0] == now:
            _, _, worker, version = heapq.heappop(self._ends)
            self._finish(worker, version, now)
        elif self._next is not None:
            self._start(self._next)
            self._next = next(self._jobs, None)
        self._look_ahead()

    def _look_ahead(self) -> None:
        start = self._next.start if self._next is not None else NEVER
        self.due = min(start, self._ends[0][0]) if self._ends else start

    def _start(self, job: Job) -> None:
        if self._shelf.newest is None:
            return  # the aggregator was down from the beginning until after the trace began
        self._order += 1
        version = self._shelf.take()
        if self._told.get(job.worker) != version:
            self._told[job.worker] = version
            self._host.download()
        heapq.heappush(self._ends, (job.end, self._order, job.worker, version))

    def _finish(self, worker: int, version: int, now: int) -> None:
        counts = self._trained.setdefault(version, Counter())
        letter = self._author.letter(worker, self._shelf[version], counts[worker])
        counts[worker] += 1
        self._host.publish(letter, now)
        self._shelf.give_back(version)
