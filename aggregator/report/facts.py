"""Everything that a report is made of, read from a run's folder."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from aggregator.ancestry import Ancestry
from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core.snapshot import SnapshotHead
from aggregator.report.chronicle import Chronicle, chronicle
from aggregator.software import software
from aggregator.tally import CONTRIBUTION_FILE, read_contributions, rows_of
from broker.jsontext import from_json
from broker.redaction import redacted

__all__ = ["Facts", "facts_of"]


@dataclass(frozen=True, slots=True)
class Facts:
    """A run, as far as its folder tells."""

    head: SnapshotHead
    """The newest checkpoint, without arrays."""
    chronicle: Chronicle
    rows: list[dict[str, Any]]
    """Workers, as of :func:`aggregator.tally.rows_of`; what was taken back does not count."""
    counting: int
    """Updates that are in the newest version."""
    summary: Mapping[str, Any]
    """``summary.json``; empty if there is none."""
    config: str
    """``config.toml``; empty if there is none."""
    settings: Mapping[str, Mapping[str, Any]]
    """The same, by table and key."""
    defaults: Mapping[str, Any]
    """Of the table ``[aggregator]``."""
    made: datetime
    """When this was read."""
    by: Mapping[str, str]
    """Which releases have read it."""

    @property
    def is_over(self) -> bool:
        """Whether the run has come to its end."""
        return self.head.done


def facts_of(folder: Path, store: CheckpointStore) -> Facts:
    """Read the run in ``folder``, which may go on meanwhile.

    Raises :class:`CheckpointError` if there is no checkpoint, or history or checkpoints cannot be read.
    """
    head = store.head()
    file = folder / "history.jsonl"
    counting = Ancestry(file, head.records).by_worker(head.version)
    told = chronicle(file, head.records, counting)
    # The demonstration's members share the second. No password is in either, but somebody may have put one there.
    config = _text(folder / "config.toml") or _text(folder / "fedmq.toml")
    config = "\n".join(map(redacted, config.splitlines()))
    settings = _tables(config)
    half_life = settings.get("aggregator", {}).get("score_half_life")
    defaults = AggregatorConfig().model_dump(mode="json")
    rows = rows_of(
        told.workers,
        head,
        half_life if isinstance(half_life, int) and half_life > 0 else defaults["score_half_life"],
        read_contributions(folder / CONTRIBUTION_FILE),
    )
    return Facts(
        head=head,
        chronicle=told,
        rows=rows,
        counting=sum(sum(counts.values()) for counts in counting.values()),
        summary=_summary(_text(folder / "summary.json")),
        config=config,
        settings=settings,
        defaults=defaults,
        made=datetime.now(UTC),
        by=software(),
    )


def _text(file: Path) -> str:
    """What a file says that a report can do without."""
    try:
        return file.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _summary(text: str) -> Mapping[str, Any]:
    try:
        found = from_json(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _tables(text: str) -> dict[str, Mapping[str, Any]]:
    try:
        found = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return {}
    return {name: table for name, table in found.items() if isinstance(table, dict)}
