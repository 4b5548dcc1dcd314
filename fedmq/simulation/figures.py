"""Pictures of a sweep, through matplotlib, which comes with ``fedmq[simulate]``."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.errors import ConfigError
from fedmq.simulation.sweep import Outcome

__all__ = ["as_data_url", "figures", "require_matplotlib"]

Array = NDArray[Any]

#: Staleness from which on all is one bar.
MOST_STALE = 30
#: Workers in the picture of the split.
MOST_SHOWN = 40
#: If the last variant takes so many times as long as the first, the scale is logarithmic.
WIDE = 10
#: Points of a curve that is drawn.
RESOLUTION = 300


def require_matplotlib() -> None:
    """Raise :class:`ConfigError` that says how to install it, if it is missing."""
    try:
        import_module("matplotlib")
    except ModuleNotFoundError as error:
        if error.name != "matplotlib":
            raise
        raise ConfigError(
            'figures need matplotlib: pip install "fedmq[simulate]", or say --no-figures for the tables alone'
        ) from None


def figures(outcomes: Sequence[Outcome]) -> dict[str, bytes]:
    """Title and PNG of each figure that these outcomes give something for."""
    variants = {name: [o for o in outcomes if o.variant == name] for name in dict.fromkeys(o.variant for o in outcomes)}
    metric = str(outcomes[0].result["metric"])
    drawn: dict[str, bytes] = {}
    for title, axis in (("Time to", "seconds"), ("Updates to", "updates"), ("Bytes to", "bytes")):
        drawn[f"{title} {metric}"] = _drawn(partial(_curves, variants=variants, metric=metric, axis=axis))
    if any(o.result["reached"] for o in outcomes):
        drawn["Time to the target, each seed"] = _drawn(lambda axes: _targets(axes, variants))
    drawn["Staleness of the updates in the model"] = _drawn(lambda axes: _staleness(axes, variants))
    split = next((o.split for o in outcomes if o.split), None)
    if split is not None:
        drawn["The split: examples of each worker by class"] = _drawn(lambda axes: _split(axes, split))
    return drawn


def as_data_url(png: bytes) -> str:
    """``png`` as a URL that holds it."""
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _drawn(draw: Callable[[Any], None]) -> bytes:
    # Not pyplot, whose figures belong to the process, and which looks for a display.
    figure = import_module("matplotlib.figure").Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    axes.grid(visible=True, alpha=0.3)
    draw(axes)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _curves(axes: Any, variants: Mapping[str, Sequence[Outcome]], metric: str, axis: str) -> None:
    """The median over the seeds, and from the lowest to the highest."""
    ends = [_curve(o, metric, axis)[0][-1] for outcomes in variants.values() for o in outcomes]
    is_wide = min(ends) * WIDE < max(ends)
    for name, outcomes in variants.items():
        curves = [_curve(outcome, metric, axis) for outcome in outcomes]
        grid = _grid(curves, is_wide=is_wide)
        # Whoever has ended stays where it was.
        values = np.array([y[np.maximum(np.searchsorted(x, grid, side="right") - 1, 0)] for x, y in curves])
        (line,) = axes.plot(grid, np.median(values, axis=0), label=name)
        if len(curves) > 1:
            axes.fill_between(grid, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
    target = next(iter(variants.values()))[0].result["target"]
    if target is not None:
        axes.axhline(target, color="grey", linestyle="--", linewidth=1)
    positive = all(p["metrics"][metric] > 0 for os in variants.values() for o in os for p in o.result["points"])
    if not next(iter(variants.values()))[0].result["grows"] and positive:
        axes.set_yscale("log")
    if is_wide:
        axes.set_xscale("log")
    axes.set_xlabel({"seconds": "virtual seconds", "updates": "updates in the model", "bytes": "bytes sent"}[axis])
    axes.set_ylabel(metric)
    axes.legend()


def _grid(curves: Sequence[tuple[Array, Array]], *, is_wide: bool) -> Array:
    """Where the curves of one variant are compared; on a logarithmic scale from its first step on."""
    high = max(x[-1] for x, _ in curves)
    if not is_wide:
        return np.linspace(0.0, high, RESOLUTION)
    return np.geomspace(min(x[1] if len(x) > 1 else high for x, _ in curves), high, RESOLUTION)


def _curve(outcome: Outcome, metric: str, axis: str) -> tuple[Array, Array]:
    points = outcome.result["points"]
    if axis == "bytes":
        x = [point["bytes_up"] + point["bytes_down"] for point in points]
    else:
        x = [point[axis] for point in points]
    return np.array(x, np.float64), np.array([point["metrics"][metric] for point in points])


def _targets(axes: Any, variants: Mapping[str, Sequence[Outcome]]) -> None:
    for place, outcomes in enumerate(variants.values()):
        times = [o.result["reached"]["seconds"] for o in outcomes if o.result["reached"]]
        if times:
            axes.bar(place, np.median(times), width=0.6, alpha=0.5)
            axes.plot([place] * len(times), times, "k.", markersize=5)
    axes.set_xticks(range(len(variants)), list(variants), rotation=20 if len(variants) > 4 else 0)
    axes.set_ylabel("virtual seconds")


def _staleness(axes: Any, variants: Mapping[str, Sequence[Outcome]]) -> None:
    width = 0.8 / len(variants)
    for place, (name, outcomes) in enumerate(variants.items()):
        counts = np.zeros(MOST_STALE + 1)
        for outcome in outcomes:
            for staleness, count in outcome.result["staleness"].items():
                counts[min(int(staleness), MOST_STALE)] += count
        axes.bar(np.arange(len(counts)) + place * width, counts / max(1.0, counts.sum()), width, label=name)
    axes.set_xlabel(f"versions ({MOST_STALE} stands for all from there on)")
    axes.set_ylabel("share of the updates")
    axes.legend()


def _split(axes: Any, split: Sequence[Sequence[int]]) -> None:
    table = np.array(split[:MOST_SHOWN])
    below = np.zeros(len(table))
    for label in range(table.shape[1]):
        axes.bar(
            range(len(table)), table[:, label], 0.9, bottom=below, label=str(label) if table.shape[1] > 1 else None
        )
        below += table[:, label]
    axes.set_xlabel("worker" if len(split) <= MOST_SHOWN else f"worker (the first {MOST_SHOWN} of {len(split)})")
    axes.set_ylabel("examples")
    if 1 < table.shape[1] <= 12:
        axes.legend(ncols=2, fontsize="small", title="class")
