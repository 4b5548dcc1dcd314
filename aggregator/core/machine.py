"""The round machine: events in, effects out. No I/O, no clock, no threads, no randomness.

Everything that decides what is in the model stands in this file, under five rules:

1. An update id counts once.
2. No acknowledgement before the commit that covers the update is durable. A redelivery of an update that is
   folded but not yet durable waits for that commit.
3. Only durable versions are broadcast.
4. Tokens of a lost connection are forgotten.
5. Time comes in with events.

At most one checkpoint is on its way to the disk; meanwhile the machine goes on folding. The snapshot borrows
the machine's arrays: parameters and the optimiser's state are replaced and never written into, and the accumulator is
copied before the next fold if a snapshot that borrowed it is still being read.

Memory, in sizes of the model: the parameters, the accumulator and the update at hand. A step turns the accumulator
into the next parameters; the ones before go when no checkpoint and no broadcast reads them any more. Half precision
counts twice in the accumulator; momentum is one more, Adam two, and those twice while a checkpoint reads the old.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.buffer import Buffer
from aggregator.core.commits import Commits
from aggregator.core.controls import Controls, Order
from aggregator.core.ending import Ending
from aggregator.core.federated import Checks
from aggregator.core.ledger import Ledger, PlainLedger
from aggregator.core.patience import Patience
from aggregator.core.roster import Roster
from aggregator.core.rounds import Round
from aggregator.core.rules import Rules
from aggregator.core.screen import refusal
from aggregator.core.screening import Screening
from aggregator.core.snapshot import Snapshot
from aggregator.core.timing import Timing
from aggregator.core.versions import Versions
from aggregator.strategies.base import gathers
from aggregator.strategies.rows import MemorySpool, Spool
from broker.messages import (
    Action,
    Goodbye,
    ModelSpec,
    Plan,
    Reason,
    Role,
    Tensors,
    Update,
    UpdateHead,
    UpdateId,
)
from broker.transport import Token

__all__ = ["RoundMachine"]

#: Names that a plan lists; workers beyond them train once more than needed, and their second update is refused.
MAX_ANSWERED = 1000


class RoundMachine:
    """The state of a run, moved by :meth:`handle`."""

    def __init__(
        self,
        rules: Rules,
        snapshot: Snapshot,
        now: float,
        *,
        pending: Rules | None = None,
        make_ledger: Callable[[PlainLedger], Ledger] = Ledger,
        spool: Spool | None = None,
    ) -> None:
        """Start from ``snapshot``, which is durable, under the epoch that it holds.

        Args:
            rules: those in force, ``snapshot.changes`` included.
            snapshot: what :meth:`CheckpointStore.claim` gave. Its accumulator is the machine's from here on.
            now: seconds; never falls from here on.
            pending: the rules that ``snapshot.pending`` makes, if it is not None.
            make_ledger: what keeps the ids, from those of ``snapshot``.
            spool: where updates are kept, if the strategy needs all of a round; memory by default.

        Raises:
            ConfigError: the run has been going on with another mode, or other control variates, than ``rules`` say.
        """
        snapshot.require_mode(rules.mode)
        snapshot.require_variates(wanted=rules.control_variates)
        self.rules = rules
        self.timing = Timing()
        self.done = False
        self.roster = Roster(rules.worker_timeout)
        self.roster.restore(snapshot.trainers, snapshot.confirmed, now)
        self.rejected = Counter(snapshot.rejected)
        self.controls = Controls.of(snapshot, pending)
        self.screening = Screening(rules, snapshot)
        self._void = snapshot.void
        self._run, self._started = snapshot.run, snapshot.started
        self._versions = Versions(snapshot, rules.optimizer)
        self._buffer = Buffer(snapshot, rules, make_ledger, spool or MemorySpool())
        self._round = Round(self.version, now, self._plan(0), entries=self._buffer.entries)
        self._kept_from = snapshot.kept_from
        self._round.plan = replace(self._round.plan, answered=self._answered())
        # Updates whose chunks are on their way, and the tokens of their other deliveries.
        self._fetching: dict[UpdateId, list[Token]] = {}
        self._commits = Commits(retry_at=now)
        self._patience = Patience(self.roster, now)
        self._linked = False
        self._ending = Ending(now, now)
        self._checks = Checks()
        self._set_done(now)

    @property
    def model(self) -> ModelSpec:
        """Names, shapes and types of the run's tensors."""
        return self._versions.model

    @property
    def version(self) -> int:
        """The newest version, which may not be durable yet."""
        return self._versions.newest

    @property
    def parameters(self) -> Tensors:
        """Those of the newest version. Not to be written into."""
        return self._versions.parameters

    @property
    def applied(self) -> int:
        """Updates in the model or in the buffer."""
        return len(self._buffer.ledger)

    @property
    def lends(self) -> bool:
        """Whether a checkpoint on its way reads from the accumulator, so that the next fold has to copy it."""
        return self._commits.borrows(self._buffer.accumulator)

    @property
    def trails(self) -> bool:
        """Whether the next fold begins a round while a checkpoint on its way reads the version before the newest.

        It would take memory beside both versions.
        """
        flight = self._commits.flight
        return flight is not None and flight.snapshot.version < self.version and not self._buffer

    @property
    def fill(self) -> int:
        """Updates in the buffer."""
        return len(self._buffer)

    def handle(self, event: on.Happening, now: float) -> list[do.Effect]:  # noqa: PLR0912 - one branch a kind of event
        """Take ``event`` in at time ``now`` (seconds, never falling) and say what is to be done, in order.

        Raises:
            StrategyError: one round after the other gives no version.
            CheckpointNotWritten: there is no room for the update that arrived; say so again later.
            CheckpointError: rows of this round cannot be read.
        """
        effects: list[do.Effect] = []
        match event:
            case on.Arrived():
                effects += self._arrived(event, now)
            case on.Announced():
                effects += self._offered(event, now)
            case on.Unreadable(token, reason, detail, worker, update):
                if worker:
                    self._round.refused.add(worker)
                if update is not None:
                    effects += [do.Ack(other) for other in self._fetching.pop(update, [])]
                effects += self._reject(token, worker, (reason, detail), update, now)
            case on.Shut(worker, reason, detail, count):
                effects += self._blame(worker, (reason, detail), None, now, count)
            case on.Joined(hello):
                self.roster.see(hello.worker, now, hello.role)
            case on.Left(goodbye):
                self._left(goodbye, now)
            case on.Seen():
                effects += self._seen(event, now)
            case on.Ordered():
                effects += self._ordered(event, now)
            case on.Evaluated(worker, version, metrics):
                self.roster.evaluated(worker, version, now)
                effects.append(do.Record(do.EvaluationRecord(worker, version, metrics)))
            case on.Checked():
                self._checked(event, now)
            case on.CheckpointCopied(commit):
                self._commits.give_back(commit)
            case on.CheckpointWritten(commit):
                effects += self._written(commit, now)
            case on.CheckpointFailed(commit, error):
                effects += self._failed(commit, error, now)
            case on.LinkUp():
                self._ending.was_announced = self._linked = True
                # If a newer version is on its way to the disk, that one is broadcast when it is there.
                effects += [self._broadcast()] if self._versions.durable.parameters else []
            case on.LinkLost(generation):
                self._linked = False
                self._fetching.clear()
                self._commits.forget(generation)
                self.controls.forget(generation)
            case on.StopRequested():
                self._ending.is_stopping = True
            case on.Tick():
                pass
        effects += self._advance(now)
        return effects

    def _left(self, goodbye: Goodbye, now: float) -> None:
        self.roster.see(goodbye.worker, now, goodbye.role)
        self.roster.confirm(goodbye.worker, goodbye.incarnation, goodbye.confirmed)
        self.roster.leave(goodbye.worker, now, goodbye.reason)
        self._ending.left_at = now

    def _seen(self, event: on.Seen, now: float) -> list[do.Effect]:
        worker = event.worker
        self.roster.see(worker, now, event.role)
        self.roster.wait(worker, event.waiting, now)
        self.roster.confirm(worker, event.incarnation, event.confirmed)
        if not self.roster.is_doubled(worker, event.incarnation):
            return []
        text = f"there are two workers called {worker}; give each its own worker.name, or its data count twice"
        return [do.Record(do.Warn(text))]

    def _checked(self, event: on.Checked, now: float) -> None:
        self.roster.note(event.worker, now)
        self._checks.add(event.worker, event.version, event.examples, event.metrics, self.rules.work.evaluate_every)

    # -------------------------------------------------------------------------------------------- updates

    def _offered(self, event: on.Announced, now: float) -> list[do.Effect]:
        """What is known or of no use is not fetched."""
        head, token = event.head, event.token
        if (known := self._known(head.id, token, now)) is not None:
            return known
        if head.id in self._fetching:
            self._fetching[head.id].append(token)
            return [do.Record(do.Repeated(head.id))]
        if self._ending.is_stopping:
            return []  # unacknowledged, so it goes back to the queue when this aggregator leaves
        if (refused := self._refusal(head, event.model, now)) is not None:
            return self._refuse(head, token, refused, now)
        self._fetching[head.id] = []
        return [do.Fetch(token)]

    def _arrived(self, event: on.Arrived, now: float) -> list[do.Effect]:
        update, token = event.update, event.token
        others = self._fetching.get(update.id, [])
        if (effects := self._known(update.id, token, now)) is not None:
            effects += [effect for other in others for effect in self._known(update.id, other, now) or []]
        elif self._ending.is_stopping:
            effects = []
        else:
            judged = self._refusal(update, update.model, now) or self.screening.judge(update)
            if isinstance(judged, tuple):
                effects = [*(do.Ack(other) for other in others), *self._refuse(update, token, judged, now)]
            else:
                effects = [self._fold(update, token, event.nbytes, judged, now)]
                self._commits.repeat(update.id, others)
        # Not before: if there was no room for it, it arrives again.
        self._fetching.pop(update.id, None)
        return effects

    def _known(self, update: UpdateId, token: Token, now: float) -> list[do.Effect] | None:
        """What becomes of an update that counts already; None if it does not."""
        self._patience.last_arrival = now
        self.roster.note(update.worker, now)
        if update in self._commits.held:
            self._commits.repeat(update, [token])
            return [do.Record(do.Repeated(update))]
        if update in self._buffer.ledger:
            return [do.Ack(token), do.Record(do.Repeated(update))]
        return None

    def _refusal(self, head: UpdateHead, claimed: ModelSpec, now: float) -> tuple[Reason, str] | None:
        refused = self.screening.refusal(head.id.worker, now) or refusal(
            head,
            claimed,
            run=self._run,
            model=self.model,
            mode=self.rules.mode,
            epoch=self._versions.epoch,
            version=self.version,
            void=self._void,
            needs_effort=self.rules.needs_effort,
            max_examples=self.rules.max_examples,
        )
        if refused is None and self.done:
            refused = Reason.RUN_DONE, f"the run ended with version {self.version}"
        return refused or self.rules.rounds.refusal(self._round, head)

    def _refuse(self, head: UpdateHead, token: Token, refused: tuple[Reason, str], now: float) -> list[do.Effect]:
        if head.base_version == self.version:
            self._round.refused.add(head.id.worker)
        return self._reject(token, head.id.worker, refused, head.id, now)

    def _fold(self, update: Update, token: Token, nbytes: int, norm: float | None, now: float) -> do.Effect:
        staleness = self.version - update.base_version
        with self.timing.fold:
            entry = self._buffer.fold(update, self.rules, self.model, staleness, norm=norm, is_lent=self.lends)
        self._commits.hold(update.id, token, nbytes, now)
        self._round.refused.discard(update.id.worker)
        goal = self.rules.rounds.goal(self._round, self._trainers(now))
        return do.Record(do.Folded(entry, self.fill, goal, update.seconds))

    def _reject(
        self, token: Token, worker: str, refused: tuple[Reason, str], update: UpdateId | None, now: float
    ) -> list[do.Effect]:
        return [do.Reject(token, *refused), *self._blame(worker, refused, update, now)]

    def _blame(
        self, worker: str, refused: tuple[Reason, str], update: UpdateId | None, now: float, count: int = 1
    ) -> list[do.Effect]:
        """What follows from a rejection, beside what becomes of the message."""
        reason, detail = refused
        self.rejected[reason.value] += count
        effects: list[do.Effect] = [do.Tell(worker, reason, detail, update)] if worker else []
        effects.append(do.Record(do.Rejected(worker, reason, detail, update, count)))
        return effects + (self.screening.reject(worker, reason, self.version, now) if worker else [])

    # -------------------------------------------------------------------------------------------- commands

    def _ordered(self, event: on.Ordered, now: float) -> list[do.Effect]:
        controls, command = self.controls, event.command
        if command in controls.held:
            controls.held[command].append(event.token)
            return []
        if controls.knows(command):
            return [do.Ack(event.token), do.Record(self._executed(command))]
        controls.hold(command, event.token)
        match event.action:
            case Action.SET:
                controls.pending = event.order
                return []
            case Action.PAUSE | Action.RESUME:
                controls.paused = event.action is Action.PAUSE
                self._round.opened = now
            case Action.STOP:
                controls.paused = False
                closed = self._close(now) if self._buffer else []
                newest = controls.pending.rules if controls.pending else self.rules
                changes = {**controls.newest, "stop_after_rounds": self.version}
                controls.pending = Order(changes, replace(newest, stop_after_rounds=self.version))
                return closed
            case Action.RELEASE:
                return self.screening.release(event.worker, self.version)
        return self._renew_plan()

    def _executed(self, command: str) -> do.Executed:
        return do.Executed(command, self.version, is_pending=self.controls.pending is not None, is_done=self.done)

    def _take_up(self, now: float) -> None:
        """What was ordered is in force; only between two rounds."""
        order, self.controls.pending = self.controls.pending, None
        if order is None:
            return
        self.controls.changes, self.rules = order.changes, order.rules
        self.roster.timeout = order.rules.worker_timeout
        self._versions.use(order.rules.optimizer)
        self.screening.use(order.rules)
        self._set_done(now)

    def _renew_plan(self) -> list[do.Effect]:
        """Tell the workers of another plan for the version that they have."""
        plan = self._round.plan
        self._round.plan = replace(self._plan(plan.attempt + 1), asked=plan.asked, answered=plan.answered)
        self._round.draws.clear()
        # A version that is not durable, or a connection that is not there, will bring the plan with it.
        return [self._broadcast()] if self._can_tell else []

    # --------------------------------------------------------------------------------------------- rounds

    def _advance(self, now: float) -> list[do.Effect]:
        """Whatever follows from the state that an event left behind."""
        effects = self._comings_and_goings(now) + self.screening.release_due(self.version, now)
        if self.controls.pending is not None and not self._buffer:
            self._take_up(now)
            effects += self._renew_plan()
        if not self.done and not self._ending.is_stopping and not self.controls.paused:
            effects += self._advance_round(now)
        has_news = bool(self._versions.records or self.controls.held or self.screening.has_news)
        at_once = has_news or bool(self._ending.is_stopping and self._commits.held)
        if self._commits.is_due(self.rules.commit, now, at_once=at_once):
            snapshot = self.snapshot(now)
            commit = self._commits.start(snapshot, self.controls.held, lent=self._buffer.accumulator)
            self.screening.has_news = False
            effects.append(do.WriteCheckpoint(commit, snapshot))
        every = self.rules.work.evaluate_every
        effects += [do.Record(figures) for figures in self._checks.close(self.version, self._trainers(now), every)]
        if (finish := self._finish(now)) is not None:
            effects += [*(do.Record(figures) for figures in self._checks.end()), finish]
        elif (wake := self._next_wake(now)) is not None:
            effects.append(do.WakeAt(wake))
        return effects

    def _comings_and_goings(self, now: float) -> list[do.Effect]:
        went, came = self.roster.news(now)
        effects: list[do.Effect] = [do.Record(do.Went(name, role, self.roster.farewell(name))) for name, role in went]
        return [*effects, *(do.Record(do.Came(name, role)) for name, role in came)]

    def _advance_round(self, now: float) -> list[do.Effect]:
        rule = self.rules.rounds
        # Whoever has left, and whose last update is being fetched, is waited for.
        present = self._trainers(now)
        if any(update.worker not in present for update in self._fetching):
            present = sorted({*present, *(update.worker for update in self._fetching)})
        if kept_out := self.screening.standings.kept_out:
            present = [worker for worker in present if worker not in kept_out]
        overdue = rule.deadline is not None and now >= self._round.opened + rule.deadline
        if self.fill and (rule.is_complete(self._round, present) or (overdue and self.fill >= rule.minimum)):
            return self._close(now)
        is_over = self._patience.is_over(self.rules, self._round, present, overdue=overdue, now=now)
        # Without a connection the question would only pile up; the next connection brings the version anyway.
        if is_over and self._can_tell:
            return self._ask_again(now, rule.goal(self._round, present))
        shortage = self._patience.shortage(self.rules, self._round, present, now)
        return [] if shortage is None else [do.Record(do.Warn(shortage))]

    def _ask_again(self, now: float, goal: int) -> list[do.Effect]:
        text = f"round of version {self.version}: {self.fill} of {goal} updates; asking the workers again"
        self._patience.ask_again_at = None
        self._round.opened = now
        self._round.refused.clear()
        plan = self._round.plan
        self._round.plan = replace(plan, attempt=plan.attempt + 1, asked=plan.asked + 1, answered=self._answered())
        return [do.Record(do.Warn(text)), self._broadcast()]

    def _close(self, now: float) -> list[do.Effect]:
        """The averaged update becomes the next version; see :meth:`Versions.step`, which may raise."""
        taken, rules = self._buffer.take(is_lent=self.lends), self.rules
        with self.timing.step:
            problem = self._versions.step(rules, *taken, opened=self._round.opened, now=now)
        self._take_up(now)
        self._set_done(now)
        self._round = Round(self.version, now, self._plan(0), entries=self._buffer.entries)
        effects: list[do.Effect] = [] if problem is None else [do.Record(do.Warn(problem))]
        return effects + self._look_back(rules, now)

    def _look_back(self, rules: Rules, now: float) -> list[do.Effect]:
        """Hold against workers what their updates have against the round that was made of all.

        Only where a rule has withstood the bad ones: a mean is where they have drawn it.
        """
        if not gathers(rules.strategy):
            return []
        updates = self._versions.records[-1].updates
        points = [(entry.id.worker, -entry.cosine) for entry in updates if entry.cosine is not None]
        return [effect for who, much in points for effect in self.screening.blame(who, much, self.version, now)]

    def _set_done(self, now: float) -> None:
        limit = self.rules.stop_after_rounds
        self.done = limit is not None and self.version >= limit
        self._ending.done_at = now

    def _plan(self, attempt: int) -> Plan:
        base = Plan(
            mode=self.rules.mode,
            seed=self.rules.seed,
            attempt=attempt,
            codec=self.rules.codec,
            work=self.rules.work,
            paused=self.controls.paused,
        )
        return self.rules.rounds.plan(base)

    def _answered(self) -> tuple[str, ...]:
        return tuple(sorted(self._round.folded)[:MAX_ANSWERED])

    def _trainers(self, now: float) -> Sequence[str]:
        return self.roster.present(Role.TRAINER, now)

    # -------------------------------------------------------------------------------------------- commits

    def snapshot(self, now: float) -> Snapshot:
        """The state as it is; arrays are borrowed (see :class:`Snapshot`)."""
        versions, buffer = self._versions, self._buffer
        return Snapshot(
            run=self._run,
            model=self.model,
            epoch=versions.epoch,
            version=versions.newest,
            parameters=versions.parameters,
            digest=versions.digest,
            optimizer=versions.memory,
            accumulator=buffer.accumulator.lend(),
            sketches=buffer.sketches.rows,
            entries=tuple(buffer.entries),
            folds=buffer.folds,
            ledger=buffer.ledger.to_plain(),
            records=tuple(versions.records),
            confirmed=self.roster.confirmed(),
            trainers=self.roster.present(Role.TRAINER, now).names,
            rejected=dict(self.rejected),
            mode=self.rules.mode.value,
            started=self._started,
            done=self.done,
            void=self._void,
            changes=self.controls.changes,
            pending=None if self.controls.pending is None else self.controls.pending.changes,
            paused=self.controls.paused,
            commands=self.controls.commands,
            kept_from=self._kept_from,
            worker_norms=self.screening.norms.to_plain(),
            recent=self._buffer.rates.to_plain(),
            standings=self.screening.standings.to_plain(self.version),
        )

    def _written(self, commit: int, now: float) -> list[do.Effect]:
        flight = self._commits.land(commit)
        if flight is None:
            return []
        is_newer = flight.snapshot.version > self._versions.durable.version
        landed = self._versions.land(flight)
        effects: list[do.Effect] = [do.Ack(token) for token in self._commits.release(flight)]
        for command in sorted(flight.commands):
            effects += [do.Ack(token) for token in self.controls.held.pop(command)]
            effects.append(do.Record(self._executed(command)))
        effects += [do.Record(do.VersionMade(record)) for record in landed]
        if is_newer:
            if self._versions.is_newest_durable:
                self._round.opened = now  # a round's time runs from when workers can know of it
            effects.append(self._broadcast())
        self._versions.let_go()
        return effects

    def _failed(self, commit: int, error: str, now: float) -> list[do.Effect]:
        if self._commits.land(commit) is None:
            return []
        self._ending.give_up()
        self.screening.has_news = True  # it may have been in the one that failed
        self._commits.retry_at = now + self.rules.retry_seconds
        return [do.Record(do.Warn(f"checkpoint not written ({error}); nothing was acknowledged; trying again"))]

    @property
    def _can_tell(self) -> bool:
        """Whether workers can be told of the newest version now."""
        return self._linked and self._versions.is_newest_durable

    def _broadcast(self) -> do.Effect:
        is_open = self._versions.is_newest_durable
        plan = self._round.plan if is_open else self._plan(0)
        return self._versions.broadcast(replace(plan, done=is_open and self.done))

    # ------------------------------------------------------------------------------------------- the end

    def _finish(self, now: float) -> do.Finish | None:
        if not self.done and not self._ending.is_stopping:
            return None
        commits, version = self._commits, self.version
        told = not self._checks.missing(version) or self._ending.figures_are_late(now)
        reason = self._ending.come(
            now,
            is_settled=not (commits.flight or commits.held or self._versions.records or self.controls.held),
            is_done=self.done,
            is_alone=told and not self._trainers(now) and not self.roster.missing_evaluation(version, now),
            linger=self.rules.linger_seconds,
        )
        return None if reason is None else do.Finish(reason)

    def _next_wake(self, now: float) -> float | None:
        """When time alone will change something."""
        times = self._commits.next_wake(self.rules.commit)
        if self._patience.ask_again_at is not None:
            times.append(self._patience.ask_again_at)
        if self.rules.rounds.deadline is not None and not self.done and not self.controls.paused:
            times.append(self._round.opened + self.rules.rounds.deadline)
        if self.done:
            times += self._ending.times(self.rules.linger_seconds)
        if (expiry := self.roster.next_expiry(now)) is not None:
            times.append(expiry)
        if (release := self.screening.standings.next_release()) is not None:
            times.append(release)
        return min((time for time in times if time > now), default=None)
