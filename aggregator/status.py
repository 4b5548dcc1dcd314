"""What an aggregator says of itself about every second, so that whoever begins to watch knows all within moments.

An event of the kind ``status``. Its data:

- ``aggregator``: its name, host and process; ``active``: whether it leads the run, or stands by; ``leaves``: it does so
  no more, and goes. Of one that stands by nothing else is said.
- ``version``, ``epoch``, ``state`` (``running``, ``paused``, ``done``), ``fill`` and ``goal`` of the buffer, ``rounds``
  after which the run ends (null if it does not), ``applied`` updates, ``rejected`` ones by reason (JSON), ``loss`` of
  the newest version, ``evaluated``, the version that was evaluated last, and its ``metrics`` (JSON).
- ``updates_per_second``, ``rounds_per_minute``; ``staleness_median``, ``_p95`` and ``_max`` of the last updates.
- ``checkpoints`` that are kept, ``checkpoint_bytes`` of their folder, ``disk_free`` and ``disk_total``.
- ``row0``, ``row1`` and so on: some of the workers (each a JSON object), as page ``page`` of ``pages``, which count
  from 0. In a row: ``name``, ``role``,
  ``present``, ``seen`` (seconds since it was heard), ``left`` (why it said goodbye), ``updates`` that count; ``state``,
  ``version``, ``loss`` and ``last`` (seconds for its last update), as its last heartbeat had them; ``seconds`` (for an
  update), ``pace`` (seconds for a local step), ``staleness`` and ``cosine``, which are means of its last updates;
  ``rejected`` by reason, ``score``, ``until`` (the end of its quarantine). What is not known or empty is left out.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aggregator.core import effects as do
from aggregator.core.machine import RoundMachine
from aggregator.core.roster import Member
from aggregator.core.snapshot import Entry, VersionRecord
from broker.messages import Event, EventKind, Role, Scalar
from broker.signing import EVENT, Signer, sealing_of
from broker.transport import AggregatorTransport, Outgoing
from broker.wire import encode

__all__ = ["PAGE", "Figures", "StatusTeller", "own_name", "rows_of"]

log = logging.getLogger("fedmq.aggregator")

#: Workers on a page: an event's data have 64 keys at most. And pages at a time: of a thousand workers, the others come
#: with the next status.
PAGE = 32
PAGES_AT_ONCE = 8
#: Letters of a text, which may have 1024 bytes on the wire.
MOST_LETTERS = 1000

#: Share of the newest update in the means of a worker.
NEWEST = 0.1
#: Workers of whom figures are kept; beyond, who came first is forgotten.
MOST_WORKERS = 10_000
#: Updates whose staleness is looked at.
RECENT = 500
#: Rates are told over so many seconds at least, and two versions, if that is not more than so many statuses.
RATE_SECONDS = 60.0
RATE_STATUSES = 1800
#: How often the disk is looked at.
DISK_SECONDS = 10.0
#: Reasons of a worker that a row holds, the most frequent ones, and letters of a farewell and of a state.
SHOWN_REASONS = 6
SHOWN_FAREWELL = 60
SHOWN_STATE = 20


def own_name() -> str:
    """This aggregator's name: its host and its process."""
    return f"{socket.gethostname()}/{os.getpid()}"


@dataclass(slots=True)
class Recent:
    """The last updates of one worker, and its last heartbeat."""

    updates: int = 0
    staleness: float | None = None
    pace: float | None = None
    seconds: float | None = None
    cosine: float | None = None
    beat: Mapping[str, Any] = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """One update more."""
        self.updates += 1
        self.staleness = _mixed(self.staleness, float(entry.staleness))
        if entry.seconds > 0:
            self.seconds = _mixed(self.seconds, entry.seconds)
            self.pace = _mixed(self.pace, entry.seconds / entry.steps) if entry.steps > 0 else self.pace

    def hear(self, data: Mapping[str, Scalar]) -> None:
        """A heartbeat. Only this much of it is kept, whatever else is in it."""
        version = data.get("version")
        self.beat = {
            "state": str(data.get("state", ""))[:SHOWN_STATE],
            "version": version if isinstance(version, int) and abs(version) <= 2**53 else None,
            "loss": _short(data.get("loss")),
            "last": _short(data.get("seconds")),
        }

    def row(self) -> dict[str, Any]:
        """What of it stands in a row of the status."""
        return {
            **self.beat,
            "seconds": _short(self.seconds),
            "pace": _short(self.pace),
            "staleness": None if self.staleness is None else round(self.staleness, 2),
            "cosine": _short(self.cosine),
        }


class Figures:
    """What the facts of a run add up to, as far as the machine does not keep it."""

    def __init__(self, applied: Mapping[str, int] | None = None) -> None:
        """``applied``: by worker, the updates that counted when this began."""
        self.workers: dict[str, Recent] = {}
        self.goal = 0
        self.loss: float | None = None
        self._applied = dict(applied or {})
        self._folded = self._made = 0
        self._staleness: deque[int] = deque(maxlen=RECENT)
        self._samples: deque[tuple[float, int, int]] = deque(maxlen=RATE_STATUSES)

    def begin(self, applied: Mapping[str, int], loss: float | None = None) -> None:
        """So many updates of each worker counted before, and ``loss`` was that of the newest version."""
        self._applied = dict(applied)
        self.loss = loss if self.loss is None else self.loss

    def note(self, fact: do.Fact) -> None:
        """Something happened."""
        match fact:
            case do.Folded(entry, _, goal):
                self.goal = goal
                self._folded += 1
                self._staleness.append(entry.staleness)
                self._recent(entry.id.worker).add(entry)
            case do.VersionMade(record):
                self._version(record)
            case _:
                pass

    def hear(self, heartbeat: Event) -> None:
        """A worker was heard."""
        self._recent(heartbeat.source).hear(heartbeat.data)

    def updates(self, worker: str) -> int:
        """Updates of ``worker`` that count."""
        recent = self.workers.get(worker)
        return self._applied.get(worker, 0) + (recent.updates if recent else 0)

    def known(self) -> Iterable[str]:
        """Workers with updates that count, or that were heard."""
        return {*self._applied, *self.workers}

    def sample(self, now: float) -> tuple[float | None, float | None]:
        """Updates a second and rounds a minute until ``now``; None before anything can be said."""
        self._samples.append((now, self._folded, self._made))
        for time, folded, made in reversed(self._samples):
            begun = time, folded, made
            if now - time >= RATE_SECONDS and self._made - made >= 2:
                break
        passed = now - begun[0]
        if passed < 0.5:
            return None, None
        return (self._folded - begun[1]) / passed, 60 * (self._made - begun[2]) / passed

    def staleness(self) -> tuple[int | None, int | None, int | None]:
        """Median, 95th percentile (nearest rank) and maximum."""
        ordered = sorted(self._staleness)
        if not ordered:
            return None, None, None
        return ordered[len(ordered) // 2], ordered[math.ceil(0.95 * len(ordered)) - 1], ordered[-1]

    def _version(self, record: VersionRecord) -> None:
        self._made += 1
        self.loss = record.loss
        for entry in record.updates:
            if entry.cosine is not None:
                recent = self._recent(entry.id.worker)
                recent.cosine = _mixed(recent.cosine, entry.cosine)

    def _recent(self, worker: str) -> Recent:
        known = self.workers.get(worker)
        if known is None:
            if len(self.workers) >= MOST_WORKERS:
                first = next(iter(self.workers))
                self._applied[first] = self.updates(first)
                del self.workers[first]
            known = self.workers[worker] = Recent()
        return known


class StatusTeller:
    """Tells the status of one aggregator."""

    def __init__(
        self,
        run: str,
        transport: AggregatorTransport,
        folder: Path,
        now: Callable[[], float],
        signer: Signer | None = None,
    ) -> None:
        """``folder`` is the checkpoints'; ``now`` gives seconds since 1970; ``signer`` signs what is told."""
        self.figures = Figures()
        self._run = run
        self._transport = transport
        self._signer = signer
        self._folder = folder
        self._now = now
        self._name = own_name()
        self._page = 0
        self._disk: dict[str, int] = {}
        self._looked = -math.inf

    def note(self, fact: do.Fact, _version: int) -> None:
        """Something happened (an observer of the reporter)."""
        self.figures.note(fact)

    def hear(self, heartbeat: Event) -> None:
        """A worker was heard."""
        self.figures.hear(heartbeat)

    def tell_standby(self, *, leaves: bool = False) -> None:
        """It stands by."""
        self._tell({"aggregator": self._name, "active": False, "leaves": leaves})

    def tell(
        self, machine: RoundMachine, epoch: int, evaluation: tuple[int, Mapping[str, float]], *, leaves: bool = False
    ) -> None:
        """It leads with ``machine``; ``evaluation`` is the version that was evaluated last, and its figures."""
        now = self._now()
        facts = self._facts(machine, epoch, evaluation, now) | {"leaves": leaves}
        names = sorted({*machine.roster.members, *machine.screening.standings.workers, *self.figures.known()})
        pages = max(1, math.ceil(len(names) / PAGE))
        for _ in range(min(pages, PAGES_AT_ONCE)):
            page = self._page % pages
            self._page = page + 1
            rows = rows_of(names[page * PAGE : (page + 1) * PAGE], machine, self.figures, now)
            told = {f"row{index}": _json(row) for index, row in enumerate(rows)}
            self._tell({**facts, "page": page, "pages": pages, **told})

    def _facts(
        self, machine: RoundMachine, epoch: int, evaluation: tuple[int, Mapping[str, float]], now: float
    ) -> dict[str, Scalar]:
        per_second, per_minute = self.figures.sample(now)
        median, p95, most = self.figures.staleness()
        evaluated, metrics = evaluation
        return {
            "aggregator": self._name,
            "active": True,
            "version": machine.version,
            "epoch": epoch,
            "state": "done" if machine.done else "paused" if machine.controls.paused else "running",
            "fill": machine.fill,
            "goal": self.figures.goal or getattr(machine.rules.rounds, "size", 0),
            "rounds": machine.rules.stop_after_rounds,
            "applied": machine.applied,
            "rejected": _json(_fitting(machine.rejected.most_common())),
            "loss": self.figures.loss,
            "evaluated": evaluated,
            "metrics": _json(_fitting([(name, _short(value)) for name, value in metrics.items()])),
            "updates_per_second": per_second,
            "rounds_per_minute": per_minute,
            "staleness_median": median,
            "staleness_p95": p95,
            "staleness_max": most,
            **self._look_at_disk(now),
        }

    def _look_at_disk(self, now: float) -> dict[str, int]:
        if now - self._looked >= DISK_SECONDS:
            self._looked = now
            try:
                self._disk = _disk(self._folder)
            except OSError as error:
                self._disk = {}
                log.debug("the folder %s does not answer as it should: %s", self._folder, error)
        return self._disk

    def _tell(self, data: Mapping[str, Scalar]) -> None:
        event = Event(run=self._run, kind=EventKind.STATUS, source="aggregator", time=self._now(), data=dict(data))
        body = encode(event, sealing_of(self._signer, EVENT))
        self._transport.event(EventKind.STATUS.value, Outgoing(body=body, headers={"run": self._run}))


def rows_of(names: Iterable[str], machine: RoundMachine, figures: Figures, now: float) -> list[dict[str, Any]]:
    """A row for each of these workers."""
    members, version = machine.roster.members, machine.version
    rows = []
    for name in names:
        row: dict[str, Any] = {"name": name, "updates": figures.updates(name), **_member(members.get(name), now)}
        if (recent := figures.workers.get(name)) is not None:
            row |= recent.row()
        row |= {
            "rejected": dict(Counter(machine.screening.standings.rejected(name)).most_common(SHOWN_REASONS)),
            "score": round(machine.screening.standings.score(name, version), 3) or None,
            "until": machine.screening.standings.until(name),
        }
        rows.append({key: value for key, value in row.items() if value is not None and value not in ("", {})})
    return rows


def _member(member: Member | None, now: float) -> dict[str, Any]:
    if member is None:
        return {}
    role = {} if member.role is Role.TRAINER else {"role": member.role.value}
    # Who is only known from a checkpoint has not been seen.
    is_known = member.present or member.incarnation or member.farewell
    seen = round(max(0.0, now - member.last_seen), 1) if is_known else None
    return {"present": member.present, "seen": seen, "left": member.farewell[:SHOWN_FAREWELL], **role}


def _mixed(mean: float | None, value: float) -> float:
    return value if mean is None else mean + NEWEST * (value - mean)


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


def _fitting(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """As many of ``pairs``, from the first on, as fit into a text."""
    found: dict[str, Any] = {}
    room = MOST_LETTERS
    for name, value in pairs:
        room -= len(_json({name: value}))
        if room < 0:
            break
        found[name] = value
    return found


def _short(value: object) -> float | None:
    """So many digits as anybody looks at; None if ``value`` is no finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    try:
        return float(f"{value:.4g}") if math.isfinite(value) else None
    except OverflowError:
        return None


def _disk(folder: Path) -> dict[str, int]:
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}
    room = os.statvfs(folder)
    kept = [name for name in sizes if name.endswith(".safetensors") and name.split(".")[0].isdecimal()]
    return {
        "checkpoints": len(kept),
        "checkpoint_bytes": sum(sizes.values()),
        "disk_free": room.f_bavail * room.f_frsize,
        "disk_total": room.f_blocks * room.f_frsize,
    }
