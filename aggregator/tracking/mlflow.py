"""MLflow: a run of it for a run of ours, on the server that ``MLFLOW_TRACKING_URI`` names, or in the run's folder."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from aggregator.tracking.base import Place, Point, needed

__all__ = ["MlFlow"]

EXPERIMENT = "fedmq"
#: Most that MLflow takes in one call.
MOST_METRICS, MOST_PARAMS = 1000, 100
#: What MLflow does not take in a name.
_ODD = re.compile(r"[^A-Za-z0-9_./ -]")


class MlFlow:
    """Logs metrics by version. A restarted aggregator goes on with the same run of MLflow."""

    @staticmethod
    def require() -> None:
        """Raise :class:`ConfigError` if its package is missing."""
        needed("mlflow", "mlflow")

    def __init__(self, place: Place) -> None:
        """The run of MLflow is looked up, or made."""
        mlflow = needed("mlflow", "mlflow")
        self._entities: Any = needed("mlflow.entities", "mlflow")
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(place.folder / 'mlflow.db').resolve()}"
        self._client: Any = mlflow.MlflowClient(uri)
        known = place.folder / "tracking" / "mlflow-run"
        if known.exists():
            self._run = known.read_text().strip()
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        found = self._client.get_experiment_by_name(name)
        experiment = self._client.create_experiment(name) if found is None else found.experiment_id
        self._run = self._client.create_run(experiment, run_name=place.run).info.run_id
        known.parent.mkdir(exist_ok=True)
        known.write_text(self._run)
        params = [self._entities.Param(key, str(value)[:500]) for key, value in _settings(place)]
        for start in range(0, len(params), MOST_PARAMS):
            self._client.log_batch(self._run, params=params[start : start + MOST_PARAMS])

    def track(self, points: list[Point]) -> None:
        """As of :class:`Tracker`."""
        metrics = [
            self._entities.Metric(_ODD.sub("-", name), value, int(point.time * 1000), point.version)
            for point in points
            for name, value in point.values.items()
        ]
        for start in range(0, len(metrics), MOST_METRICS):
            self._client.log_batch(self._run, metrics=metrics[start : start + MOST_METRICS])

    def close(self) -> None:
        """As of :class:`Tracker`. The run of MLflow stays open: ours may go on."""


def _settings(place: Place) -> Iterator[tuple[str, Any]]:
    for name, table in place.settings.items():
        if isinstance(table, dict) and name != "broker":
            for key, value in table.items():
                yield f"{name}.{key}", value
