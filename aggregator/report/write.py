"""``report.html``: what there is to tell of a run, from its history, its newest checkpoint and its settings."""

from __future__ import annotations

import logging
from pathlib import Path

from aggregator.checkpoint import CheckpointStore
from aggregator.disk import replace_file
from aggregator.report import parts
from aggregator.report.facts import Facts, facts_of
from aggregator.report.page import page
from broker.errors import CheckpointNotWritten

__all__ = ["REPORT_FILE", "render", "try_report", "write_report"]

log = logging.getLogger("fedmq.aggregator")

REPORT_FILE = "report.html"


def write_report(folder: Path, store: CheckpointStore, target: Path | None = None) -> Path:
    """Tell of the run in ``folder`` on one page, which is ``target``, or ``report.html`` in that folder.

    Reads only, and may be done while the run goes on.

    Raises:
        CheckpointNotWritten: the page cannot be written.
        CheckpointError: there is no run, or it cannot be read.
    """
    file = folder / REPORT_FILE if target is None else target
    content = render(facts_of(folder, store)).encode()
    try:
        replace_file(file, lambda opened: opened.write(content))
    except OSError as error:
        raise CheckpointNotWritten(f"{file}: {error.strerror}; choose another --output, or make room") from None
    return file


def try_report(folder: Path, store: CheckpointStore) -> None:
    """As :func:`write_report`, at the end of a run, which no report is worth failing for."""
    try:
        write_report(folder, store)
    except Exception as error:  # noqa: BLE001 - whatever it is, the run itself is safe
        log.warning("no %s: %s ('fedmq report --run %s' tries again)", REPORT_FILE, error, store.run)


def render(facts: Facts) -> str:
    """The page."""
    head = facts.head
    body = (
        parts.headline(facts),
        parts.figures(facts),
        parts.workers(facts),
        parts.rejections(facts),
        parts.lineage(facts),
        parts.configuration(facts),
        parts.software(facts),
    )
    subtitle = f"A run of fedmq up to version {head.version}. Made {facts.made:%Y-%m-%d %H:%M:%S} UTC."
    return page(f"Run {head.run}", subtitle, "\n".join(part for part in body if part))
