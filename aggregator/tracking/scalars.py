"""From a line of the history to numbers that trackers show."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from statistics import fmean, median
from typing import Any

from aggregator.tracking.base import Point

__all__ = ["point_of"]

#: Metrics of one line that are shown.
MOST = 64


def point_of(line: Mapping[str, Any], rejected: Counter[str]) -> Point | None:
    """The numbers in ``line``; None if there are none.

    ``rejected`` holds the rejections of the lines before, by reason, and those of this one afterwards.
    """
    version, time = line.get("version"), _number(line.get("time"))
    if not isinstance(version, int) or isinstance(version, bool) or time is None:
        return None
    pairs = list(_pairs(line, rejected))[:MOST]
    values = {name: number for name, value in pairs if (number := _number(value)) is not None}
    return Point(version, time, values) if values else None


def _pairs(line: Mapping[str, Any], rejected: Counter[str]) -> Iterator[tuple[str, object]]:
    match line.get("kind"):
        case "version" if line.get("source") is None:
            yield from _of_round(line)
        case "version":
            yield "lineage/taken_back_to", line.get("source")
        case "evaluation":
            for name, value in _items(line.get("metrics")):
                yield f"held_out/{name}", value
        case "federated":
            for name, spread in _items(line.get("metrics")):
                for key in ("mean", "min", "max"):
                    yield f"workers/{name}/{key}", dict(_items(spread)).get(key)
        case "rejected":
            for _, reasons in _items(line.get("workers")):
                rejected.update({reason: n for reason, n in _items(reasons) if isinstance(n, int)})
            for reason, number in rejected.items():
                yield f"rejected/{reason}", number
        case "start":
            yield "lineage/epoch", line.get("epoch")


def _of_round(line: Mapping[str, Any]) -> Iterator[tuple[str, object]]:
    entries = [entry for entry in line.get("updates") or () if isinstance(entry, Mapping)]
    yield "train/loss", line.get("loss")
    yield "round/seconds", line.get("seconds")
    yield "round/updates", len(entries)
    yield "round/workers", len({str(entry.get("worker")) for entry in entries})
    for name in ("staleness", "norm", "cosine"):
        numbers = [number for entry in entries if (number := _number(entry.get(name))) is not None]
        if numbers:
            yield f"{name}/mean", fmean(numbers)
            yield f"{name}/median", median(numbers)
            yield f"{name}/min", min(numbers)
            yield f"{name}/max", max(numbers)


def _items(value: object) -> list[tuple[str, Any]]:
    return [(str(name), inner) for name, inner in value.items()] if isinstance(value, Mapping) else []


def _number(value: object) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) else None  # type: ignore[arg-type]
