"""Strategies: one file each, one line in the table."""

from collections.abc import Callable, Mapping
from typing import Literal

from aggregator.strategies.base import Accumulator, Strategy
from aggregator.strategies.mean import Mean

__all__ = ["STRATEGIES", "Accumulator", "Mean", "Strategy"]

#: Name in the configuration, and what makes the strategy from (weighting, staleness weight).
STRATEGIES: Mapping[str, Callable[[Literal["examples", "uniform"], Callable[[int], float]], Strategy]] = {
    "mean": Mean,
}
