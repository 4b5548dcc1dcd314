"""Trackers: where else a run's numbers go. One file each, one line in the table."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pydantic import ValidationInfo

from aggregator.tracking.base import Place, Point, Tracker
from aggregator.tracking.mlflow import MlFlow
from aggregator.tracking.tensorboard import TensorBoard
from aggregator.tracking.wandb import WeightsAndBiases
from broker.parts import Name, Parts, part_of

__all__ = ["TRACKERS", "Place", "Point", "Tracker", "checked", "tracker_names", "trackers_of"]

#: Name in the configuration, and what opens the tracker.
TRACKERS: Parts[Callable[[Place], Tracker]] = Parts(
    "tracker",
    "fedmq.trackers",
    {"tensorboard": TensorBoard, "mlflow": MlFlow, "wandb": WeightsAndBiases},
)


def tracker_names(text: str) -> tuple[str, ...]:
    """The names in ``text``, which are separated by commas."""
    return tuple(dict.fromkeys(filter(None, (part.strip() for part in text.split(",")))))


def checked(text: str, info: ValidationInfo) -> str:
    """``text``, if all names in it are those of trackers. Raises ValueError."""
    return ",".join(Name(TRACKERS)(name, info) for name in tracker_names(text))


def trackers_of(names: Iterable[str]) -> dict[str, Callable[[Place], Tracker]]:
    """What opens each. Raises :class:`ConfigError`."""
    return {name: part_of(TRACKERS, name, may_import=True) for name in names}
