"""What a tracker is: something that shows a run's numbers beside those of other experiments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from broker.errors import ConfigError

__all__ = ["Place", "Point", "Tracker", "needed"]


@dataclass(frozen=True, slots=True)
class Place:
    """What a tracker is opened for."""

    run: str
    """The run's name."""
    folder: Path
    """The run's, in which a tracker may have a folder of its own."""
    settings: Mapping[str, Any]
    """Those in force, by table and key, without passwords."""
    newest: int
    """The newest version that was tracked before; 0 at the beginning."""


@dataclass(frozen=True, slots=True)
class Point:
    """Numbers of one version."""

    version: int
    time: float
    """Seconds since 1970."""
    values: Mapping[str, float]
    """By name, like ``train/loss``; all finite."""


class Tracker(Protocol):
    """Takes points, on one thread. May raise anything: then it is closed, and opened again later.

    What opens it may have a function ``require``, which raises :class:`ConfigError` if it cannot be opened here.
    """

    def track(self, points: list[Point]) -> None:
        """Keep ``points``, so that they are not lost when this returns."""

    def close(self) -> None:
        """Nothing comes any more."""


def needed(module: str, extra: str) -> ModuleType:
    """The package ``module``. Raises :class:`ConfigError` that says how to install it, if it is missing."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        raise ConfigError(
            f'aggregator.tracking names {extra!r}, which needs {error.name}: pip install "fedmq[{extra}]"'
        ) from None
