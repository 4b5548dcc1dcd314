"""What decides the numbers of a version: the settings that its line in the history has, as one value.

Strategies, optimisers and the like are made from it, by the configuration for the versions to come and by a replay
for those that have been. So whatever one of them needs to know stands here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Literal

from pydantic import TypeAdapter

from broker.messages import Mode, Scalar

__all__ = ["Recipe"]


@dataclass(frozen=True, slots=True)
class Recipe:
    """Fields are called as the settings of ``[aggregator]``.

    Those with defaults came after 0.1; their defaults are what it did, so that a line without them means the same.
    They may never change. Values may be of other kinds in a setting (a rate that is not set); here they are in force.
    """

    mode: Mode
    strategy: str
    weighting: Literal["examples", "uniform"]
    staleness: str
    staleness_exponent: float
    optimizer: str
    learning_rate: float
    momentum: float
    staleness_slope: float = 10.0
    staleness_threshold: int = 4
    staleness_decay: float = 0.3
    normalize_staleness: bool = False
    nesterov: bool = False
    weight_decay: float = 0.0
    beta2: float | None = None
    """None for the optimiser's own."""
    epsilon: float | None = None
    """None for the optimiser's own."""
    schedule: str = "constant"
    schedule_rounds: int | None = None
    schedule_decay: float = 0.1
    schedule_floor: float = 0.0
    warmup_rounds: int = 0
    byzantine: int = 1
    pre_aggregation: str = ""
    clip_radius: float | None = None
    """None for the median of the round."""
    clip_iterations: int = 3
    seed: int = 0
    """Rules over all updates of a round may draw from it."""
    options: str = ""
    """What a part of another package is told."""

    @classmethod
    def of(cls, settings: Mapping[str, Scalar]) -> Recipe:
        """What a line says. Raises pydantic's ValidationError."""
        return _ADAPTER.validate_python(settings)

    def settings(self) -> dict[str, Scalar]:
        """For a line: without what is as in 0.1."""
        named = {f.name: (getattr(self, f.name), f.default) for f in fields(self)}
        return {
            name: value.value if isinstance(value, Mode) else value
            for name, (value, default) in named.items()
            if default is MISSING or value != default
        }

    def beta1(self, default: float) -> float:
        """Of Adam and its kin, whose ``momentum`` it is: ``default`` if that is zero."""
        return self.momentum or default


_ADAPTER: TypeAdapter[Recipe] = TypeAdapter(Recipe)
