"""Robust rules and what goes before them: one file each, one line in a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from aggregator.strategies.rows import Rows
from aggregator.strategies.rules.base import Occasion, PreAggregation, Rule
from aggregator.strategies.rules.bucketing import Bucketing
from aggregator.strategies.rules.centered_clipping import CenteredClipping
from aggregator.strategies.rules.clipping import Clipping
from aggregator.strategies.rules.geometric_median import GeometricMedian
from aggregator.strategies.rules.krum import Krum, MultiKrum
from aggregator.strategies.rules.median import Median
from aggregator.strategies.rules.nearest_neighbours import NearestNeighbours
from aggregator.strategies.rules.norm_clipping import NormClipping
from aggregator.strategies.rules.trimmed_mean import TrimmedMean
from broker.errors import ConfigError
from broker.messages import Array

__all__ = [
    "PRE_AGGREGATIONS",
    "RULES",
    "Chain",
    "Occasion",
    "PreAggregation",
    "Rule",
    "RuleSettings",
    "pre_aggregations_of",
]


@dataclass(frozen=True, slots=True)
class RuleSettings:
    """What rules are made from; each takes what it knows."""

    byzantine: int = 1
    """Bad workers that are assumed."""
    clip_radius: float | None = None
    clip_iterations: int = 3


#: Name in the configuration, and what makes the rule.
RULES: Mapping[str, Callable[[RuleSettings], Rule]] = {
    "centered-clipping": lambda s: CenteredClipping(s.byzantine, s.clip_radius, s.clip_iterations),
    "geometric-median": lambda s: GeometricMedian(s.byzantine),
    "krum": lambda s: Krum(s.byzantine),
    "median": lambda s: Median(s.byzantine),
    "multi-krum": lambda s: MultiKrum(s.byzantine),
    "norm-clipping": lambda s: NormClipping(s.byzantine, s.clip_radius),
    "trimmed-mean": lambda s: TrimmedMean(s.byzantine),
}

#: Name, and what makes the pre-aggregation from the text after the colon and the settings.
PRE_AGGREGATIONS: Mapping[str, Callable[[str, RuleSettings], PreAggregation]] = {
    "bucketing": lambda text, _: Bucketing(_group(text)),
    "clip": lambda text, s: Clipping(_nothing(text, s.byzantine)),
    "nnm": lambda text, s: NearestNeighbours(_nothing(text, s.byzantine)),
}


@dataclass(frozen=True, slots=True)
class Chain:
    """A rule behind pre-aggregations; itself a rule."""

    before: tuple[PreAggregation, ...]
    rule: Rule

    @property
    def remembers(self) -> bool:
        """As its rule."""
        return self.rule.remembers

    def least(self) -> int:
        """Rows of which enough are left at every stage."""
        count = max(1, self.rule.least())
        while not self._suffices(count):
            count += 1
        return count

    def _suffices(self, count: int) -> bool:
        for stage in self.before:
            if count < stage.least():
                return False
            count = stage.left(count)
        return count >= self.rule.least()

    def __call__(self, rows: Rows, occasion: Occasion) -> Array:
        """See :class:`Rule`."""
        for stage in self.before:
            rows = stage(rows, occasion)
        return self.rule(rows, occasion)


def pre_aggregations_of(text: str, settings: RuleSettings) -> tuple[PreAggregation, ...]:
    """The stages that ``text`` names, like ``nnm`` or ``bucketing:2,nnm``; none for an empty text.

    Raises :class:`ConfigError`: there is none of this name; says which there are.
    """
    stages: Sequence[str] = [stage.strip() for stage in text.split(",")] if text.strip() else []
    made = []
    for stage in stages:
        name, _, argument = stage.partition(":")
        try:
            made.append(PRE_AGGREGATIONS[name](argument, settings))
        except (KeyError, ValueError):
            raise ConfigError(
                f"no pre-aggregation is called {stage!r}; there are clip, nnm and bucketing:SIZE with a size of 2 or "
                "more, one or, separated by commas, one after the other"
            ) from None
    return tuple(made)


def _group(text: str) -> int:
    size = int(text) if text else 2
    if size < 2:
        raise ValueError(text)
    return size


def _nothing(text: str, value: int) -> int:
    if text:
        raise ValueError(text)
    return value
