"""What stands in a run's checkpoints, and whether it is whole and agrees with the history. Reads only.

Nothing is locked or claimed: an aggregator may go on writing. A file that it deletes meanwhile is passed over.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.checkpoint import CheckpointStore
from aggregator.checkpointfile import ForeignCheckpoint
from aggregator.core.ledger import Ledger
from aggregator.core.snapshot import Entry, Snapshot
from broker.errors import CheckpointCorrupt, CheckpointError, CheckpointNotWritten, WrongRun
from broker.messages import Array, Tensors, parameters_digest

__all__ = ["Condition", "FileFacts", "check_epoch", "check_files", "check_snapshot", "describe", "listed", "survey"]

#: Names that one line of a problem lists.
SHOWN = 3


class Condition(StrEnum):
    """What can be done with a file."""

    WHOLE = "whole"
    DAMAGED = "damaged"
    FOREIGN = "newer format"
    STRANGE = "another run"
    UNREADABLE = "unreadable"
    ASIDE = "set aside"


@dataclass(frozen=True, slots=True)
class FileFacts:
    """One file, without its arrays. Counts are None if it cannot be relied on."""

    file: str
    condition: Condition
    written: datetime
    """By the file system, in UTC."""
    bytes: int
    detail: str = ""
    """Why it is not whole."""
    version: int | None = None
    epoch: int | None = None
    buffered: int | None = None
    """Updates of the round that is open."""
    applied: int | None = None
    """Updates in the model or in the buffer."""


def survey(store: CheckpointStore) -> Iterator[tuple[FileFacts, Snapshot | None]]:
    """Each file of ``store``, newest first, then those that were set aside as damaged; read when it is its turn."""
    for file in [*store.files(), *sorted(store.folder.glob("*.damaged"), reverse=True)]:
        try:
            status = file.stat()
        except OSError:
            continue
        condition, detail, snapshot = _read(store, file)
        if condition is Condition.UNREADABLE and not file.exists():
            continue
        written = datetime.fromtimestamp(status.st_mtime, UTC)
        if snapshot is None:
            yield FileFacts(file.name, condition, written, status.st_size, detail), None
            continue
        yield (
            FileFacts(
                file=file.name,
                condition=condition,
                written=written,
                bytes=status.st_size,
                version=snapshot.version,
                epoch=snapshot.epoch,
                buffered=len(snapshot.entries),
                applied=len(Ledger(snapshot.ledger)),
            ),
            snapshot,
        )


def _read(store: CheckpointStore, file: Path) -> tuple[Condition, str, Snapshot | None]:
    if file.suffix == ".damaged":
        return Condition.ASIDE, "damaged; the run went on from the file before it", None
    try:
        return Condition.WHOLE, "", store.read(file)
    except ForeignCheckpoint as error:
        return Condition.FOREIGN, str(error), None
    except CheckpointCorrupt as error:
        return Condition.DAMAGED, str(error), None
    except WrongRun as error:
        return Condition.STRANGE, str(error), None
    except CheckpointError as error:
        return Condition.UNREADABLE, str(error), None


# ---------------------------------------------------------------------------------------------- in full


def describe(snapshot: Snapshot) -> dict[str, Any]:
    """``snapshot`` as JSON would have it, tensors by their figures."""
    return {
        "run": snapshot.run,
        "version": snapshot.version,
        "epoch": snapshot.epoch,
        "digest": snapshot.digest,
        "mode": snapshot.mode or None,
        "started": datetime.fromtimestamp(snapshot.started, UTC).isoformat(timespec="seconds"),
        "done": snapshot.done,
        "paused": snapshot.paused,
        "changes": dict(snapshot.changes),
        "pending": None if snapshot.pending is None else dict(snapshot.pending),
        "void": [list(versions) for versions in snapshot.void],
        "updates_kept_from": snapshot.kept_from,
        "optimizer": {"step": snapshot.optimizer.step, "slots": sorted(snapshot.optimizer.slots)},
        "rejected": dict(snapshot.rejected),
        "present": list(snapshot.trainers),
        "ledger": _by_worker(snapshot),
        "buffer": {
            "updates": snapshot.accumulator.count,
            "weight": snapshot.accumulator.weight,
            "entries": [_entry(entry) for entry in snapshot.entries],
        },
        "tensors": [
            {
                "name": spec.name,
                "shape": list(spec.shape),
                "dtype": spec.dtype,
                "role": spec.role.value,
                "bytes": spec.nbytes,
                "norm": _norm(snapshot.parameters[spec.name]),
                "not_finite": _not_finite(snapshot.parameters[spec.name]),
            }
            for spec in snapshot.model.tensors
        ],
    }


def _by_worker(snapshot: Snapshot) -> list[dict[str, Any]]:
    """The ledger, a line an incarnation; ``confirmed`` is what the worker last said, None if it has not."""
    return [
        {
            "worker": worker,
            "incarnation": incarnation,
            "applied": sum(last - first + 1 for first, last in pairs),
            "seqs": [list(pair) for pair in pairs],
            "confirmed": snapshot.confirmed.get(worker, {}).get(incarnation),
        }
        for worker, by_incarnation in sorted(snapshot.ledger.items())
        for incarnation, pairs in sorted(by_incarnation.items())
    ]


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "update": str(entry.id),
        "base_version": entry.base_version,
        "staleness": entry.staleness,
        "weight": entry.weight,
        "examples": entry.examples,
        "loss": entry.loss,
    }


def _norm(array: Array) -> float | None:
    """In float64; None if it is not finite, which JSON has no number for."""
    with np.errstate(all="ignore"):
        norm = float(np.linalg.norm(array.reshape(-1).astype(np.float64)))
    return norm if np.isfinite(norm) else None


def _not_finite(array: Array) -> int:
    """How many numbers are NaN or infinite."""
    return 0 if array.dtype.kind in "iub" else int(array.size - np.count_nonzero(np.isfinite(array)))


# ------------------------------------------------------------------------------------------------ checks


def check_files(
    found: Iterable[tuple[FileFacts, Snapshot | None]],
) -> Iterator[tuple[FileFacts, Snapshot | None, list[str]]]:
    """A :func:`survey`, and what is wrong with each file, also beside the newer one before it."""
    newer: tuple[FileFacts, Ledger] | None = None
    for facts, snapshot in found:
        if snapshot is None:
            yield facts, None, [] if facts.condition is Condition.ASIDE else [facts.detail]
            continue
        problems = [f"{facts.file}: {problem}" for problem in check_snapshot(snapshot)]
        ledger = Ledger(snapshot.ledger)
        if newer is not None:
            problems += _check_order(facts, snapshot, ledger, *newer)
        # No array of it, so that memory holds one model.
        newer = facts, ledger
        yield facts, snapshot, problems


def _check_order(
    facts: FileFacts, snapshot: Snapshot, ledger: Ledger, newer: FileFacts, newer_ledger: Ledger
) -> list[str]:
    problems = []
    if snapshot.version > (newer.version or 0) or snapshot.epoch > (newer.epoch or 0):
        problems.append(
            f"{facts.file} (version {snapshot.version}, epoch {snapshot.epoch}) is newer than {newer.file} (version "
            f"{newer.version}, epoch {newer.epoch}), whose number is higher: files of two folders were mixed"
        )
    lost = [str(one) for one in ledger if one not in newer_ledger]
    if lost:
        problems.append(f"{newer.file} lacks {len(lost)} updates that {facts.file} has: {listed(lost)}")
    return problems


def check_snapshot(snapshot: Snapshot) -> list[str]:
    """What is wrong in a checkpoint whose checksum is right."""
    problems = []
    if parameters_digest(snapshot.parameters) != snapshot.digest:
        problems.append("the parameters do not have the digest that stands beside them")
    for what, tensors in _tensors(snapshot):
        spoiled = [name for name, array in tensors.items() if _not_finite(array)]
        if spoiled:
            problems.append(f"{what} not finite in {listed(spoiled)}")
    if snapshot.accumulator.count != len(snapshot.entries):
        problems.append(
            f"the buffer holds {snapshot.accumulator.count} updates, and {len(snapshot.entries)} are listed"
        )
    if snapshot.folds and sum(count for count, _ in snapshot.folds) != len(snapshot.entries):
        problems.append("the settings under which the buffer was filled are not those of its updates")
    return problems + _check_ledger(snapshot)


def _tensors(snapshot: Snapshot) -> Iterator[tuple[str, Tensors]]:
    yield "the parameters are", snapshot.parameters
    for slot, tensors in snapshot.optimizer.slots.items():
        yield f"the optimiser's {slot} is", tensors
    yield "the buffer is", snapshot.accumulator.tensors


def _check_ledger(snapshot: Snapshot) -> list[str]:
    problems = []
    for worker, by_incarnation in snapshot.ledger.items():
        for incarnation, pairs in by_incarnation.items():
            ends = [end for pair in pairs for end in pair]
            # Closed intervals with gaps between them: 0-3, 5-5, 7-9.
            is_sound = all(len(pair) == 2 and pair[0] <= pair[1] for pair in pairs) and all(
                ends[i] + 1 < ends[i + 1] for i in range(1, len(ends) - 1, 2)
            )
            if not is_sound:
                problems.append(f"the ledger of {worker}/{incarnation} is out of order")
    if problems:
        return problems
    ledger = Ledger(snapshot.ledger)
    ids = [entry.id for entry in snapshot.entries]
    unknown = [str(one) for one in ids if one not in ledger]
    if unknown:
        problems.append(f"{len(unknown)} updates in the buffer are not in the ledger: {listed(unknown)}")
    if len(set(ids)) < len(ids):
        problems.append("an update is in the buffer twice")
    return problems


def check_epoch(store: CheckpointStore, snapshot: Snapshot) -> list[str]:
    """What is wrong with the folder's ``epoch`` file."""
    try:
        epoch = store.stored_epoch()
    except (CheckpointCorrupt, CheckpointNotWritten) as error:
        return [str(error)]
    if epoch < snapshot.epoch:
        text = (
            f"{store.folder / 'epoch'} says {epoch}, and the newest checkpoint is of epoch {snapshot.epoch}: the file "
            "was lost or restored; the next 'fedmq aggregator' makes it anew"
        )
        return [text]
    return []


def listed(names: list[str]) -> str:
    """The first of ``names``."""
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
