"""Strategies that do what they must not, and what they may; named as ``tests.support.strategies:Nan``."""

from __future__ import annotations

from typing import Any

import numpy as np

from aggregator.strategies import Accumulator, Mean
from broker.messages import Array, ModelSpec

__all__ = ["Absent", "Nan", "Reshaped"]


class Nan(Mean):
    """Its aggregate is not finite."""

    def finish(self, accumulator: Accumulator, model: ModelSpec) -> dict[str, Array]:
        return {name: array * np.nan for name, array in super().finish(accumulator, model).items()}


class Reshaped(Mean):
    """Its aggregate has another shape."""

    def finish(self, accumulator: Accumulator, model: ModelSpec) -> dict[str, Array]:
        return {name: array[None] for name, array in super().finish(accumulator, model).items()}


class Absent(Mean):
    """Its aggregate is not there."""

    def finish(self, accumulator: Accumulator, model: ModelSpec) -> Any:
        return {}
