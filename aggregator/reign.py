"""What an aggregator has from its turn on: the run's state under a new epoch, and what is kept of it on disk."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from aggregator.archive import UpdateArchive, base_file
from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core.ledger import counted
from aggregator.core.machine import RoundMachine
from aggregator.core.rules import Rules
from aggregator.core.snapshot import Changes, Snapshot, SnapshotHead
from aggregator.history import History
from aggregator.recipe import Recipe
from aggregator.results import is_written
from aggregator.schedules import schedule_of
from aggregator.spool import DiskSpool
from aggregator.status import StatusTeller
from aggregator.strategies import stepping, strategy_of
from broker.errors import CheckpointNotWritten, ConfigError
from broker.logs import describe
from broker.messages import Scalar

__all__ = ["Reign", "claim", "rules_of", "rules_to_begin", "shown"]

log = logging.getLogger("fedmq.aggregator")

#: Kept updates, in sizes of the model, after which another state is kept to begin replays with.
BASE_EVERY = 64


class Reign:
    """The round machine of an aggregator that leads, and where its updates go."""

    def __init__(
        self, machine: RoundMachine, snapshot: Snapshot, archive: UpdateArchive | None, spool: DiskSpool
    ) -> None:
        self.machine = machine
        self.archive = archive
        """All updates, if they are kept."""
        self.spool = spool
        """Those of the open round, if the strategy needs them all."""
        self.epoch = snapshot.epoch
        self.started = snapshot.started
        self.trainers = snapshot.trainers
        self.begun_at = (snapshot.version, snapshot.done)
        self._based_at = 0
        # By worker, the updates that counted when this began.
        self._applied: dict[str, int] | None = counted(snapshot.ledger)
        self._loss = snapshot.records[-1].loss if snapshot.records else None

    def tell_status(
        self, teller: StatusTeller, evaluation: tuple[int, Mapping[str, float]], *, leaves: bool = False
    ) -> None:
        """Let whoever watches know how the run stands; see :meth:`StatusTeller.tell`."""
        if self._applied is not None:
            teller.figures.begin(self._applied, self._loss)
            self._applied = None
        teller.tell(self.machine, self.epoch, evaluation, leaves=leaves)

    def keep_another_base(self, store: CheckpointStore, snapshot: Snapshot) -> None:
        """Keep ``snapshot`` as a state to begin replays with, if much was kept since the last and no round is open.

        A record that is damaged then spoils the replays of few versions, not of all later ones.
        """
        if self.archive is None or snapshot.entries:
            return
        if self.archive.size - self._based_at < BASE_EVERY * snapshot.model.nbytes:
            return
        try:
            store.save(snapshot, base_file(self.archive.file.parent, snapshot.version))
        except CheckpointNotWritten as error:
            log.warning("%s; replays begin further back", error)
        else:
            self._based_at = self.archive.size


def claim(
    config: AggregatorConfig,
    store: CheckpointStore,
    history: History,
    folder: Path,
    *,
    newest: tuple[int, int],
    now: float,
    accept_older: bool,
    drop_changes: bool,
) -> Reign:
    """Own the run from now on, under an epoch above all that folder, history and ``newest`` know.

    Args:
        config: the settings; what was changed on the running run goes on top of them.
        store: the run's checkpoints.
        history: the run's, in ``folder``.
        folder: where results and kept updates are.
        newest: epoch and version of the newest broadcast.
        now: seconds since 1970.
        accept_older: begin with the newest checkpoint even if newer versions have been seen.
        drop_changes: forget what was changed on the running run.

    Raises:
        CheckpointNotWritten: the folder does not let it, for now.
        FedmqError: what no waiting will cure.
    """
    history.mend()
    epoch, version = newest
    snapshot = store.claim(
        epoch=max(epoch, history.last_epoch),
        version=max(version, history.last_version),
        now=now,
        accept_older=accept_older,
    )
    if drop_changes:
        snapshot = replace(snapshot, changes={}, pending=None)
        store.write(snapshot)
    elif snapshot.changes:
        log.info("changed while the run went on, and still in force: %s", shown(snapshot.changes))
        if snapshot.done and "stop_after_rounds" in snapshot.changes:
            log.warning("this has ended the run; --drop-changes goes on with it")
    latest = max([snapshot.started, history.last_time, *(record.time for record in snapshot.records)])
    if now < latest - 60:
        log.warning("the clock says %.0f s before the run's last version: times in the history fall", latest - now)
    snapshot, rules, pending = rules_to_begin(config, snapshot)
    if config.keep_updates:
        snapshot = _keep_base(snapshot, store, folder / "updates")
    else:
        snapshot = replace(snapshot, kept_from=None)
    if snapshot.done and is_written(folder):
        snapshot = replace(snapshot, trainers=())  # whoever led to the end has waited for them
    spool = DiskSpool(store.folder, snapshot.epoch)
    machine = RoundMachine(rules, snapshot, now, pending=pending, spool=spool)
    describe(epoch=snapshot.epoch, version=snapshot.version)
    history.open(snapshot.records, epoch=snapshot.epoch, version=snapshot.version, now=now)
    archive = UpdateArchive(folder / "updates", snapshot.epoch) if config.keep_updates else None
    return Reign(machine, snapshot, archive, spool)


def _keep_base(snapshot: Snapshot, store: CheckpointStore, folder: Path) -> Snapshot:
    """``snapshot``, whose state is kept as well if it is the first from which on updates are."""
    if snapshot.kept_from is not None and base_file(folder, snapshot.kept_from).exists():
        # One more where the run was taken back: replays of what comes now need nothing of before.
        if snapshot.records and snapshot.records[-1].source is not None and not snapshot.entries:
            store.save(snapshot, base_file(folder, snapshot.version))
        return snapshot
    store.save(snapshot, base_file(folder, snapshot.version))
    log.info("keeping every update that is applied from now on in %s", folder)
    return replace(snapshot, kept_from=snapshot.version)


def rules_to_begin(config: AggregatorConfig, snapshot: Snapshot) -> tuple[Snapshot, Rules, Rules | None]:
    """The rules that are in force at first, and those from the next round on; and ``snapshot``, which may tell of them.

    A round that was begun with another strategy goes on as it was begun: what one has in the checkpoint is of no use to
    another. Then ``config`` is in force from the next round on.

    Raises as :func:`rules_of`.
    """
    rules = rules_of(config, snapshot, snapshot.changes)
    pending = None if snapshot.pending is None else rules_of(config, snapshot, snapshot.pending)
    # A checkpoint of 0.1 does not tell the settings; there was one strategy.
    mean = replace(config.changed(snapshot.changes).recipe(), strategy="mean").settings()
    settings = snapshot.folds[-1][1] if snapshot.folds else {**rules.settings, **mean}
    if not snapshot.entries or settings["strategy"] == rules.settings["strategy"]:
        return snapshot, rules, pending
    begun = Recipe.of(settings)
    until = replace(
        rules,
        strategy=strategy_of(begun),
        optimizer=stepping(begun),
        schedule=schedule_of(begun),
        settings=settings,
    )
    log.info("the open round goes on with strategy %s; the settings of now are for the next one", begun.strategy)
    newest = snapshot.changes if snapshot.pending is None else snapshot.pending
    return replace(snapshot, pending=newest), until, pending or rules


def rules_of(config: AggregatorConfig, snapshot: SnapshotHead, changes: Changes) -> Rules:
    """The rules that ``config`` with ``changes`` makes for the run of ``snapshot``.

    Raises :class:`ConfigError` if they do not go together, or not with how the run has been going on.
    """
    snapshot.require_mode(config.mode)
    snapshot.require_variates(wanted=config.control_variates)
    try:
        return config.changed(changes).rules(snapshot.model.nbytes)
    except ConfigError as error:
        raise ConfigError(
            f"{error}: it was changed while the run went on, and does not go with the settings of now; mend these, "
            "or start with --drop-changes"
        ) from None


def shown(changes: Mapping[str, Scalar]) -> str:
    """Changes of settings as an operator reads them."""
    parts = (
        f"{name}={value}" if value is not None else f"{name} taken back" for name, value in sorted(changes.items())
    )
    return ", ".join(parts)
