"""Results as tidy CSV: one observation a row, the same columns for every sweep."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fedmq.simulation.sweep import Outcome

__all__ = ["write_tables"]

Row = dict[str, Any]

#: Facts of a result that are one number or word.
FACTS = (
    *("metric", "target", "ended", "seconds", "versions", "updates", "published", "deliveries", "repeated", "events"),
    *("crashes", "left", "bytes_up", "bytes_down", "digest"),
)


def write_tables(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """``summary``, ``curves``, ``staleness``, ``rejected`` and ``split`` (if there is one) as CSV files in ``folder``.

    All have the columns ``variant`` and ``seed``. Times are virtual seconds.
    """
    tables = {
        "summary": map(_summary, outcomes),
        "curves": _curves(outcomes),
        "staleness": _counted(outcomes, "staleness"),
        "rejected": _counted(outcomes, "rejected"),
        "split": _split(outcomes),
    }
    written = []
    for name, rows in tables.items():
        file = folder / f"{name}.csv"
        if _write(file, rows):
            written.append(file)
    return written


def _write(file: Path, rows: Iterable[Row]) -> bool:
    """Whether there was anything to write."""
    kept = list(rows)
    if not kept:
        file.unlink(missing_ok=True)
        return False
    columns = list(dict.fromkeys(name for row in kept for name in row))
    with file.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(kept)
    return True


def _summary(outcome: Outcome) -> Row:
    result = outcome.result
    reached = result["reached"] or {}
    return {
        "variant": outcome.variant,
        "seed": outcome.seed,
        **{name: result[name] for name in FACTS},
        **{f"reached_{name}": reached.get(name) for name in ("seconds", "updates", "bytes_up", "bytes_down")},
        **{f"final_{name}": value for name, value in result["points"][-1]["metrics"].items()},
        "took_seconds": round(outcome.took, 3),
    }


def _curves(outcomes: Sequence[Outcome]) -> Iterator[Row]:
    for outcome in outcomes:
        for point in outcome.result["points"]:
            facts = {name: value for name, value in point.items() if name != "metrics"}
            for metric, value in point["metrics"].items():
                yield {"variant": outcome.variant, "seed": outcome.seed, **facts, "metric": metric, "value": value}


def _counted(outcomes: Sequence[Outcome], what: str) -> Iterator[Row]:
    name = "reason" if what == "rejected" else what
    for outcome in outcomes:
        for key, count in outcome.result[what].items():
            yield {"variant": outcome.variant, "seed": outcome.seed, name: key, "updates": count}


def _split(outcomes: Sequence[Outcome]) -> Iterator[Row]:
    for outcome in outcomes:
        for worker, row in enumerate(outcome.split or ()):
            for label, count in enumerate(row):
                if count:
                    yield {
                        "variant": outcome.variant,
                        "seed": outcome.seed,
                        "worker": f"w{worker}",
                        "class": label,
                        "examples": count,
                    }
