"""An earlier version, or a rebuilt one, becomes the newest: as one step, and whoever leads the run takes it up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError, safe_open

from aggregator.checkpoint import CheckpointStore
from aggregator.core.snapshot import Snapshot, SnapshotHead, rolled_back
from aggregator.lineage import Lineage, Replay
from aggregator.optimizers import OptimizerState
from broker.errors import CheckpointError, CheckpointOutdated, LineageError
from broker.jsontext import from_json
from broker.messages import Tensors, parameters_digest

__all__ = ["adopt", "checkpoint_versions", "find_checkpoint", "open_lineage", "roll_back"]

log = logging.getLogger("fedmq.lineage")

#: How often to run after a run that goes on, and how many versions behind it are near enough.
CATCH_UPS = 5
FEW = 3


def open_lineage(folder: Path, store: CheckpointStore) -> Lineage:
    """The lineage of the run in ``folder`` as it is now. Raises :class:`CheckpointError`."""
    lineage = Lineage(folder, store)
    lineage.refresh(store.head())
    return lineage


def find_checkpoint(lineage: Lineage, store: CheckpointStore, version: int) -> Snapshot | None:
    """The state of ``version`` from a checkpoint that is still there and whole, or None.

    Raises :class:`LineageError` if one is there whose parameters are not those that the history tells of.
    """
    files = [file for kept, file in _checkpoints(store) if kept == version]
    if version in lineage.bases:
        files.append(lineage.bases[version])
    for file in files:
        try:
            snapshot = store.read(file)
        except CheckpointError as error:
            log.warning("%s; passed over", error)
            continue
        digest = parameters_digest(snapshot.parameters)
        if lineage.knows(version) and lineage.record(version).after != digest:
            raise LineageError(f"{file}: its parameters are not those that the history tells of: of another run?")
        return snapshot
    return None


def checkpoint_versions(store: CheckpointStore) -> list[int]:
    """Versions of which there are checkpoints."""
    return sorted({version for version, _ in _checkpoints(store)})


def roll_back(
    lineage: Lineage, store: CheckpointStore, version: int, parameters: Tensors, optimizer: OptimizerState
) -> Snapshot:
    """Make ``parameters`` and ``optimizer``, which are those of ``version``, the run's newest version.

    Raises :class:`CheckpointError`; nothing has changed then.
    """

    def change(head: Snapshot) -> Snapshot:
        _require_newest(lineage, head)
        return rolled_back(
            head, to=version, head=head.version, parameters=parameters, optimizer=optimizer, now=time.time()
        )

    return store.supersede(change)


def adopt(
    replay: Replay, store: CheckpointStore, leave_out: frozenset[str], *, go_on: bool, report: Callable[[int], None]
) -> Snapshot:
    """Make what ``replay`` has rebuilt without ``leave_out`` the run's newest version.

    All versions from the first one on that came out otherwise are void.

    Args:
        replay: it has run.
        store: the run's checkpoints.
        leave_out: the workers that were left out.
        go_on: rebuild what the run has made since as well.
        report: is told of each version that is rebuilt thus.

    Raises :class:`CheckpointError`; nothing has changed then.
    """

    def catch_up(head: SnapshotHead) -> int:
        replay.lineage.refresh(head)
        count = replay.plan(head.version) if go_on else 0
        for version in replay.run() if go_on else ():
            report(version)
        return count

    def change(head: Snapshot) -> Snapshot:
        catch_up(head)
        _require_newest(replay.lineage, head)
        result = replay.result
        altered = min(version for version, count in result.left_out.items() if count)
        return rolled_back(
            head,
            to=result.version,
            head=head.version,
            parameters=result.parameters,
            optimizer=result.optimizer,
            now=time.time(),
            since=min(altered, result.version + 1),
            without=tuple(sorted(leave_out)),
        )

    # Most of it while the run goes on: in the last step its aggregator has to wait.
    for _ in range(CATCH_UPS):
        if catch_up(store.head()) < FEW:
            break
    return store.supersede(change)


def _require_newest(lineage: Lineage, head: SnapshotHead) -> None:
    if lineage.newest > head.version:
        raise CheckpointOutdated(
            f"the newest checkpoint is of version {head.version}, and {lineage.history} tells of version "
            f"{lineage.newest}: was an old copy restored? Start 'fedmq aggregator' first, which settles that"
        )


def _checkpoints(store: CheckpointStore) -> list[tuple[int, Path]]:
    """Version and file of each checkpoint that says so, newest first; tensors are not read."""
    found: list[tuple[int, Path]] = []
    for file in store.files():
        try:
            with safe_open(file, framework="np") as content:
                found.append((int(from_json((content.metadata() or {})["state"])["version"]), file))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, OverflowError):
            log.warning("%s cannot be read", file)
    return found
