"""The cheap objective: each worker has a parabola, and the minimum of their mean is known.

Worker i has f_i(x) = 1/2 sum_d a_id (x_d - c_id)^2, and the run minimises their mean, whose minimum is
x*_d = sum_i a_id c_id / sum_i a_id. One gradient step of length r moves x_d - c_id by the factor 1 - r a_id, so that
s steps are one multiplication, and a million workers are two arrays. Where curvatures differ between workers, several
local steps have another fixed point than x*, as real federated averaging has (Charles and Konecny 2021, arXiv
2103.05032).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.messages import Mode, ModelSpec, Parameters, Tensors, TensorSpec
from fedmq.simulation.objectives import Work
from fedmq.simulation.randomness import stream
from fedmq.simulation.scenario import ObjectiveTable

__all__ = ["Quadratic"]

Array = NDArray[Any]

_BLOCK = 1024


class Quadratic:
    """See the module. ``loss`` is f(x) - f(x*), and ``gap`` that in units of what the run began with."""

    def __init__(self, table: ObjectiveTable, *, workers: int, mode: Mode, seed: int) -> None:
        generator = stream(seed, "objective")
        dimensions = table.dimensions
        # From 1 to 1 / condition over the dimensions; up to a factor of two between workers.
        steepness = np.geomspace(1.0, 1.0 / table.condition, dimensions)
        curvature = (steepness * (0.5 + 0.5 * generator.random((workers, dimensions)))).astype(np.float32)
        self._centres = generator.standard_normal((workers, dimensions), np.float32)
        self._centres *= np.float32(table.heterogeneity)
        self._mean_curvature = curvature.mean(axis=0, dtype=np.float64)
        weighted = np.einsum("wd,wd->d", curvature, self._centres, dtype=np.float64) / workers
        self._optimum = weighted / self._mean_curvature
        self._start = self._optimum + 10.0
        if mode is Mode.GRADIENT:
            self._factors = curvature
        else:
            shrink = np.float32(1.0) - np.float32(table.local_rate) * curvature
            self._factors = curvature
            self._factors[...] = shrink
            for _ in range(table.local_steps - 1):
                self._factors *= shrink
            self._factors -= np.float32(1.0)
        self._sends_parameters = mode is Mode.PARAMETERS
        self._steps = 0 if mode is Mode.GRADIENT else table.local_steps
        self._noise = table.noise
        self._generator = stream(seed, "noise")
        self._drawn = np.empty((0, dimensions), np.float32)
        self._used = 0
        self.model = ModelSpec((TensorSpec("x", (dimensions,), "float32"),))
        self.metric = "loss"

    def initial(self) -> dict[str, Array]:
        """Ten away from the minimum in each dimension."""
        return {"x": self._start.astype(np.float32)}

    def train(self, worker: int, base: Parameters, ordinal: int) -> Work:
        """A gradient at ``base``, or what the local steps change, or lead to."""
        del ordinal
        change = base.tensors["x"] - self._centres[worker]
        change *= self._factors[worker]
        if self._noise:
            change += self._next_noise()
        if self._sends_parameters:
            change += base.tensors["x"]
        return Work({"x": change}, steps=self._steps, effort=float(self._steps))

    def score(self, tensors: Tensors) -> dict[str, float]:
        """Excess of the mean loss over its minimum, which is exact: the mean of parabolas is one."""
        loss = self._excess(np.asarray(tensors["x"], np.float64))
        return {"loss": loss, "gap": loss / self._excess(self._start)}

    def counts(self) -> Array | None:
        """There are no examples."""
        return None

    def _excess(self, x: Array) -> float:
        return float(0.5 * (self._mean_curvature * (x - self._optimum) ** 2).sum())

    def _next_noise(self) -> Array:
        if self._used == len(self._drawn):
            shape = _BLOCK, self._centres.shape[1]
            self._drawn, self._used = self._generator.standard_normal(shape, np.float32) * np.float32(self._noise), 0
        self._used += 1
        row: Array = self._drawn[self._used - 1]
        return row
