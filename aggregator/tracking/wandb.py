"""Weights & Biases: online with ``WANDB_API_KEY``, in files with ``WANDB_MODE=offline``."""

from __future__ import annotations

import hashlib
import os
from typing import Any

from aggregator.tracking.base import Place, Point, needed

__all__ = ["WeightsAndBiases"]


class WeightsAndBiases:
    """Logs by version. A restarted aggregator goes on with the same run, as far as W&B can resume it."""

    @staticmethod
    def require() -> None:
        """Raise :class:`ConfigError` if its package is missing."""
        needed("wandb", "wandb")

    def __init__(self, place: Place) -> None:
        """The run is named and known by ours, and by its folder: the same name elsewhere is another run."""
        # It would write beside the log, and into it.
        os.environ.setdefault("WANDB_SILENT", "true")
        wandb = needed("wandb", "wandb")
        where = hashlib.sha256(str(place.folder.resolve()).encode()).hexdigest()[:8]
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or "fedmq",
            name=place.run,
            id=f"{place.run}-{where}",
            resume="allow",
            dir=str(place.folder),
            config={name: table for name, table in place.settings.items() if name != "broker"},
        )
        # Evaluations come after the next version: W&B's own steps must rise, ours stand beside the values.
        self._run.define_metric("version")
        self._run.define_metric("*", step_metric="version")

    def track(self, points: list[Point]) -> None:
        """As of :class:`Tracker`."""
        for point in points:
            self._run.log({**point.values, "version": point.version, "time": point.time})

    def close(self) -> None:
        """As of :class:`Tracker`."""
        self._run.finish()
