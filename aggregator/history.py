"""``history.jsonl``: one line a version, an evaluation, a start. For people and their plotting scripts.

The checkpoint is the truth; the history follows it. A version's line is appended after the checkpoint that
holds it is durable, and made up for at the next start if a crash came in between.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from aggregator.core.effects import EvaluationRecord
from aggregator.core.snapshot import Entry, VersionRecord
from broker.errors import CheckpointNotWritten

__all__ = ["History", "read_history"]


class History:
    """Appends to the history file of a run."""

    def __init__(self, file: Path) -> None:
        """Nothing is touched yet."""
        self.file = file
        self._last_version = 0

    def open(self, records: tuple[VersionRecord, ...], *, epoch: int, version: int, now: float) -> None:
        """Mend the end of the file, add the versions in ``records`` that it lacks, and note the start."""
        try:
            self._cut_torn_line()
        except OSError as error:
            raise CheckpointNotWritten(f"{self.file}: {error.strerror}") from None
        lines = [line for line in read_history(self.file) if line.get("kind") == "version"]
        self._last_version = min(max((line["version"] for line in lines), default=0), version)
        for record in records:
            self.version(record)
        self._append({"kind": "start", "epoch": epoch, "version": version, "time": round(now, 3)})

    def version(self, record: VersionRecord) -> None:
        """A version is durable. One that the file has already is passed over."""
        if record.version <= self._last_version:
            return
        self._last_version = record.version
        self._append(
            {
                "kind": "version",
                "version": record.version,
                "epoch": record.epoch,
                "time": round(record.time, 3),
                "seconds": round(record.seconds, 4),
                "loss": record.loss,
                "before": record.before,
                "after": record.after,
                "updates": [_entry(entry) for entry in record.updates],
            }
        )

    def evaluation(self, record: EvaluationRecord, now: float) -> None:
        """An evaluator has reported."""
        self._append(
            {
                "kind": "evaluation",
                "version": record.version,
                "worker": record.worker,
                "time": round(now, 3),
                # JSON has no NaN, and a model that diverged is no reason for a file that cannot be read.
                "metrics": {name: value if math.isfinite(value) else None for name, value in record.metrics.items()},
            }
        )

    def _append(self, line: Mapping[str, Any]) -> None:
        try:
            with self.file.open("a") as file:
                file.write(json.dumps(line, allow_nan=False) + "\n")
        except OSError as error:
            raise CheckpointNotWritten(
                f"{self.file}: {error.strerror}; make room or make the folder writable"
            ) from None

    def _cut_torn_line(self) -> None:
        """A crash may have left half a line at the end."""
        if not self.file.exists():
            return
        content = self.file.read_bytes()
        if content and not content.endswith(b"\n"):
            with self.file.open("r+b") as file:
                file.truncate(content.rfind(b"\n") + 1)


def read_history(file: Path) -> Iterator[dict[str, Any]]:
    """The lines of a history file as dictionaries; an unfinished last line is passed over."""
    if not file.exists():
        return
    with file.open() as lines:
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)


def _entry(entry: Entry) -> dict[str, Any]:
    return {
        "worker": entry.id.worker,
        "incarnation": entry.id.incarnation,
        "seq": entry.id.seq,
        "base_version": entry.base_version,
        "staleness": entry.staleness,
        "weight": entry.weight,
        "examples": entry.examples,
        "loss": entry.loss,
    }
