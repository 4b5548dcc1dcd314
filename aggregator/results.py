"""What a run leaves behind besides its checkpoints: ``summary.json``, ``model.safetensors``, ``report.html``."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from aggregator.ancestry import Ancestry
from aggregator.checkpoint import CheckpointStore, write_tensors
from aggregator.core.federated import Federated
from aggregator.core.machine import RoundMachine
from aggregator.disk import replace_file
from aggregator.report import try_report
from broker.errors import CheckpointError, CheckpointNotWritten
from broker.messages import Tensors
from broker.variates import without_variates

__all__ = ["Outcome", "is_written", "write_model", "write_results"]

log = logging.getLogger("fedmq.aggregator")


@dataclass(frozen=True, slots=True)
class Outcome:
    """How an aggregator's work ended."""

    reason: str
    version: int
    epoch: int
    applied: int
    rejected: Mapping[str, int]
    confirmed: int
    metrics: Mapping[str, float]
    """The newest evaluation's."""
    evaluated: int = -1
    """The version that was evaluated last; -1 for none."""
    federated: Federated | None = None
    """What workers have reported last, by data that they hold out."""
    buffered: int = 0
    """Updates of those applied that are in the open round yet."""

    @classmethod
    def of(
        cls,
        machine: RoundMachine,
        reason: str,
        epoch: int,
        evaluation: tuple[int, Mapping[str, float]],
        federated: Federated | None,
    ) -> Outcome:
        """Of ``machine``, whose work ended for ``reason``; ``evaluation`` is the newest one's version and figures."""
        return cls(
            reason=reason,
            version=machine.version,
            epoch=epoch,
            applied=machine.applied,
            rejected=dict(machine.rejected),
            confirmed=sum(sum(counts.values()) for counts in machine.roster.confirmed().values()),
            metrics=evaluation[1],
            evaluated=evaluation[0],
            federated=federated,
            buffered=machine.fill,
        )


def is_written(folder: Path) -> bool:
    """Whether both files are in ``folder``."""
    return all((folder / name).exists() for name in ("summary.json", "model.safetensors"))


def write_results(
    folder: Path, store: CheckpointStore, outcome: Outcome, parameters: Tensors, *, seconds: float
) -> None:
    """Write both files, each whole or not at all, and ``report.html`` if the run is over and it can be made.

    Raises :class:`CheckpointNotWritten`.
    """
    summary = {
        "run": store.run,
        "outcome": outcome.reason,
        "rounds": outcome.version,
        "epoch": outcome.epoch,
        "seconds": round(seconds, 3),
        "updates": {
            "confirmed": outcome.confirmed,
            "applied": outcome.applied,
            "taken_back": _taken_back(folder, outcome),
            "rejected": sum(outcome.rejected.values()),
            "rejected_by_reason": dict(outcome.rejected),
        },
        "evaluated_version": outcome.evaluated if outcome.evaluated >= 0 else None,
        "evaluation": {name: value if math.isfinite(value) else None for name, value in outcome.metrics.items()},
    }
    if (figures := outcome.federated) is not None:
        means = {name: spread.mean for name, spread in figures.metrics.items()}
        summary["federated"] = {"versions": list(figures.versions), "workers": figures.workers, "metrics": means}
    try:
        text = (json.dumps(summary, indent=2) + "\n").encode()
        replace_file(folder / "summary.json", lambda file: file.write(text))
        write_model(folder / "model.safetensors", store.run, parameters)
    except OSError as error:
        raise CheckpointNotWritten(
            f"{folder}: {error.strerror}; the run itself is safe in its checkpoint: make room, start again"
        ) from None
    if outcome.reason == "done":
        try_report(folder, store)


def _taken_back(folder: Path, outcome: Outcome) -> int | None:
    """Of the applied updates, those that do not count any more; None if the history does not tell."""
    try:
        ancestry = Ancestry(folder / "history.jsonl")
    except CheckpointError as error:
        log.warning("summary.json does not say how many updates were taken back: %s", error)
        return None
    if not ancestry.is_whole(outcome.version):
        return None
    return max(0, outcome.applied - outcome.buffered - sum(ancestry.updates(outcome.version).values()))


def write_model(target: Path, run: str, parameters: Tensors, **facts: str) -> None:
    """``parameters`` as a file that ``safetensors.torch.load_file`` reads. Raises :class:`OSError`.

    Control variates, which are no part of the model, are left out.
    """
    metadata = {"format": "pt", "run": run, **facts}
    replace_file(target, lambda file: write_tensors(file, without_variates(parameters), metadata))
