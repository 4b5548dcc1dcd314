"""TensorBoard's event files, through tensorboardX, which needs neither TensorFlow nor torch."""

from __future__ import annotations

import secrets

from aggregator.tracking.base import Place, Point, needed

__all__ = ["TensorBoard"]


class TensorBoard:
    """Writes to ``<run's folder>/tensorboard``."""

    @staticmethod
    def require() -> None:
        """Raise :class:`ConfigError` if its package is missing."""
        needed("tensorboardX", "tensorboard")

    def __init__(self, place: Place) -> None:
        """What an earlier writer has written beyond ``place.newest`` comes again, and counts once."""
        self._writer = needed("tensorboardX", "tensorboard").SummaryWriter(
            str(place.folder / "tensorboard"),
            purge_step=place.newest + 1 if place.newest else None,
            # By itself a file is called by the second, and one that is opened in the same second takes its place.
            filename_suffix=f".{secrets.token_hex(4)}",
        )

    def track(self, points: list[Point]) -> None:
        """As of :class:`Tracker`."""
        for point in points:
            for name, value in point.values.items():
                self._writer.add_scalar(name, value, point.version, walltime=point.time)
        self._writer.flush()

    def close(self) -> None:
        """As of :class:`Tracker`."""
        self._writer.close()
