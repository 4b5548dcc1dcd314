"""What an aggregator tells: the history, the events for whoever watches, notices to workers, the log."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from aggregator.core import effects as do
from aggregator.core.federated import Federated
from aggregator.core.snapshot import VersionRecord
from aggregator.history import History
from aggregator.status import MOST_LETTERS
from broker.logs import describe
from broker.messages import Event, EventKind, Reason, Scalar, UpdateId
from broker.signing import EVENT, Signer, notice_to, sealing_of
from broker.transport import AggregatorTransport, Outgoing
from broker.wire import encode

__all__ = ["Observer", "Reporter"]

log = logging.getLogger("fedmq.aggregator")

#: Workers that a version's line in the log names.
SHOWN_NAMES = 8
#: Seconds between two events about updates that were folded: people do not look more often, and with small updates
#: one each would take as long as the folding.
FOLDED_SECONDS = 0.05
#: Updates that one such event tells of. It names as many as fit.
MOST_NAMED = 200

#: Seconds between two lines in the history about rejections, if no version is made meanwhile.
REJECTED_SECONDS = 10.0
#: Workers that such a line names; the others are counted under the empty name.
MOST_REJECTED = 200

#: Evaluations that wait for the next version, to be told in its line of the log.
MOST_EVALUATIONS = 3

#: Metrics of workers that an event of progress holds.
SHOWN_METRICS = 50

#: Hears of a fact, and which version was the newest then.
Observer = Callable[[do.Fact, int], None]


class Reporter:
    """Tells what the round machine wants recorded."""

    def __init__(
        self,
        run: str,
        transport: AggregatorTransport,
        history: History,
        now: Callable[[], float],
        *,
        observers: Sequence[Observer] = (),
        signer: Signer | None = None,
    ) -> None:
        """``now`` gives seconds since 1970; ``observers`` hear of each fact, and of the version of then."""
        self._signer = signer
        self.metrics: tuple[int, Mapping[str, float]] = (-1, {})
        """Version and figures of the newest evaluation."""
        self.federated: Federated | None = None
        """The newest that workers have reported."""
        self._run = run
        self._transport = transport
        self._history = history
        self._now = now
        self._observers = tuple(observers)
        self._commands: dict[str, str] = {}
        self._folded: list[do.Folded] = []
        self._folded_version = 0
        self._told_folded = 0.0
        self._rejected: dict[str, Counter[str]] = {}
        self._rejected_version = 0
        self._told_rejected = 0.0
        self._evaluations: list[str] = []

    def expect(self, command: str, text: str) -> None:
        """``command``, which will be executed, is called ``text`` when it is."""
        self._commands[command] = text

    def tell(self, worker: str, reason: Reason, detail: str, update: UpdateId | None) -> None:
        """Let ``worker`` know that its update was rejected."""
        data: dict[str, Scalar] = {"reason": reason.value, "detail": detail[:500], "update": str(update or "")}
        event = Event(run=self._run, kind=EventKind.NOTICE, source="aggregator", time=self._now(), data=data)
        body = encode(event, sealing_of(self._signer, notice_to(worker)))
        self._transport.notify(worker, Outgoing(body=body, headers={"run": self._run}))

    def progress(self, what: str, version: int, **data: float | str | None) -> None:
        """Something happened while ``version`` was the newest."""
        event = Event(
            run=self._run,
            kind=EventKind.PROGRESS,
            source="aggregator",
            time=self._now(),
            data={"what": what, "version": version, **data},
        )
        body = encode(event, sealing_of(self._signer, EVENT))
        self._transport.event("progress", Outgoing(body=body, headers={"run": self._run, "what": what}))

    def due_in(self) -> float | None:
        """Seconds until :meth:`tell_folded` has something to do; None if nothing is to be told."""
        return max(0.0, self._told_folded + FOLDED_SECONDS - self._now()) if self._folded else None

    def tell_folded(self, *, at_once: bool = False) -> None:
        """Tell of the updates that were folded, if it is time; with ``at_once`` the history of rejections, too."""
        if at_once:
            self._tell_rejected()
            self._tell_evaluated()
        if not self._folded or not (at_once or self._now() - self._told_folded >= FOLDED_SECONDS):
            return
        self._told_folded = self._now()
        facts, self._folded = self._folded, []
        self.progress(
            "folded",
            self._folded_version,
            updates=len(facts),
            # A name has no colon and no space.
            staleness=_joined(f"{fact.entry.id.worker}:{fact.entry.staleness}" for fact in facts),
            fill=facts[-1].fill,
            goal=facts[-1].goal,
        )

    def record(self, fact: do.Fact, version: int) -> None:
        """``fact`` happened while ``version`` was the newest."""
        for observe in self._observers:
            observe(fact, version)
        match fact:
            case do.Folded():
                self._folded.append(fact)
                self._folded_version = version
                self.tell_folded(at_once=len(self._folded) >= MOST_NAMED)
            case do.VersionMade(record):
                describe(version=record.version)
                evaluated, self._evaluations = self._evaluations, []
                self.tell_folded(at_once=True)
                self._history.version(record)
                staleness = [entry.staleness for entry in record.updates]
                self.progress("version", version, loss=record.loss, updates=len(staleness), seconds=record.seconds)
                log.info(
                    "version %d: %s, loss %s, staleness up to %d, %.2f s%s",
                    record.version,
                    _senders(record),
                    "unknown" if record.loss is None else f"{record.loss:.4f}",
                    max(staleness, default=0),
                    record.seconds,
                    "".join(f"; {text}" for text in evaluated),
                )
            case do.EvaluationRecord() | Federated():
                self._evaluated(fact, version)
            case do.Rejected(worker, reason, detail, update, count):
                self.progress("rejected", version, worker=worker, reason=reason.value, count=count)
                # What was on its way when the last round closed is the end of every healthy run.
                level = logging.INFO if reason is Reason.RUN_DONE else logging.WARNING
                what = update or ("a message" if count == 1 else f"{count} messages, unread,")
                log.log(level, "rejected %s of %s: %s: %s", what, worker or "?", reason, detail)
                self._count_rejected(worker, reason, version, count)
            case do.Came(worker, role):
                log.info("%s %s is here", role, worker)
            case do.Went(worker, role, ""):
                log.warning("%s %s has been silent for too long; not waiting for it", role, worker)
            case do.Went(worker, role, reason):
                log.info("%s %s has left: %s", role, worker, reason)
            case do.Repeated(update_id):
                log.debug("update %s came again; it counts once", update_id)
            case do.Executed(command, made, is_pending, is_done):
                text = self._commands.pop(command, "a command")
                when = f"from version {made + 1} on" if is_pending else f"at version {made}"
                when += "; the run has ended" if is_done else ""
                log.info("%s: in force %s", text, when)
                self._history.command(text, version=made, is_pending=is_pending, now=self._now())
                self.progress("command", version, id=command, accepted=True, text=f"{text}: in force {when}"[:500])
            case do.Quarantined() | do.Released():
                self._standing(fact)
            case do.Warn(text):
                log.warning("%s", text)

    def _count_rejected(self, worker: str, reason: Reason, version: int, count: int) -> None:
        name = worker if worker in self._rejected or len(self._rejected) < MOST_REJECTED else ""
        self._rejected.setdefault(name, Counter())[reason.value] += count
        self._rejected_version = version
        if self._now() - self._told_rejected >= REJECTED_SECONDS:
            self._tell_rejected()

    def _tell_rejected(self) -> None:
        if self._rejected:
            self._told_rejected = self._now()
            self._history.rejected(self._rejected, version=self._rejected_version, now=self._told_rejected)
            self._rejected = {}

    def _evaluated(self, fact: do.EvaluationRecord | Federated, version: int) -> None:
        if isinstance(fact, do.EvaluationRecord):
            self._history.evaluation(fact, self._now())
            if fact.version >= self.metrics[0]:
                self.metrics = fact.version, fact.metrics
            self._say_evaluated(f"version {fact.version} evaluated by {fact.worker}: {_figures(fact.metrics)}")
            return
        self.federated = fact
        self._history.federated(fact, self._now())
        means = {name: spread.mean for name, spread in list(fact.metrics.items())[:SHOWN_METRICS]}
        self.progress("federated", version, of=fact.version, workers=fact.workers, examples=fact.examples, **means)
        first, last = fact.versions
        which = f"version {last}" if first == last else f"versions {first} to {last}"
        self._say_evaluated(f"{which} by {fact.workers} workers on data of their own: {_spreads(fact)}")

    def _say_evaluated(self, text: str) -> None:
        """With the next version, or alone if there are several or none comes: a line a round is enough."""
        self._evaluations.append(text)
        if len(self._evaluations) > MOST_EVALUATIONS:
            self._tell_evaluated()

    def _tell_evaluated(self) -> None:
        for text in self._evaluations:
            log.info("%s", text)
        self._evaluations = []

    def _standing(self, fact: do.Quarantined | do.Released) -> None:
        self._history.standing(fact, self._now())
        if isinstance(fact, do.Quarantined):
            self.progress("quarantine", fact.version, worker=fact.worker, score=fact.score, until=fact.until)
            seconds = fact.until - self._now()
            log.warning("%s is in quarantine for %.0f s: its score is %.2f", fact.worker, seconds, fact.score)
        else:
            self.progress("release", fact.version, worker=fact.worker)
            log.info("%s is out of quarantine", fact.worker)


def _joined(words: Iterable[str]) -> str:
    """As many of ``words`` as a text on the wire may hold."""
    text = " ".join(words)
    return text if len(text) <= MOST_LETTERS else text[: text.rindex(" ", 0, MOST_LETTERS + 1)]


def _senders(record: VersionRecord) -> str:
    """``4 updates of a, b (2), c``."""
    counts = Counter(entry.id.worker for entry in record.updates)
    names = [f"{name} ({n})" if n > 1 else name for name, n in sorted(counts.items())]
    shown = ", ".join(names[:SHOWN_NAMES]) + (f" and {len(names) - SHOWN_NAMES} more" if names[SHOWN_NAMES:] else "")
    return f"{len(record.updates)} update{'s' * (len(record.updates) != 1)} of {shown}"


def _spreads(figures: Federated) -> str:
    return ", ".join(f"{n} {s.mean:.4f} ({s.minimum:.4f} to {s.maximum:.4f})" for n, s in figures.metrics.items())


def _figures(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
