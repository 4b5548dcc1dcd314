"""Learning rates of the server that change over a run: a factor on the rate, by the version that a step starts from.

Pure functions of the version's number, so that a restart, a standby and a replay step as the first time, and a change
of ``learning_rate`` on the running run changes the rate that the factor is of. They are torch.optim.lr_scheduler's of
the same names, with versions for its steps: the first step starts from version 0.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from aggregator.recipe import Recipe
from broker.errors import StrategyError
from broker.parts import Parts, made

__all__ = ["SCHEDULES", "Schedule", "constant", "cosine", "factor_at", "schedule_of", "step", "warmed_up"]

#: From the number of versions before the step to the factor.
Schedule = Callable[[int], float]


def constant(_version: int) -> float:
    """Always 1."""
    return 1.0


def step(every: int, decay: float) -> Schedule:
    """``decay ** (version // every)``, as StepLR."""
    return lambda version: decay ** (version // every)


def cosine(length: int, floor: float) -> Schedule:
    """Half a cosine from 1 to ``floor`` at version ``length``, and ``floor`` from then on.

    Loshchilov & Hutter 2017 (arXiv 1608.03983), equation 5, without restarts; CosineAnnealingLR up to there.
    """

    def factor(version: int) -> float:
        # Rounded, since the last bit of a cosine depends on the machine's library.
        return round(floor + (1 - floor) * (1 + math.cos(math.pi * min(version, length) / length)) / 2, 12)

    return factor


def warmed_up(schedule: Schedule, versions: int) -> Schedule:
    """From ``1 / versions`` to 1 in as many steps (Goyal et al. 2017, arXiv 1706.02677), then ``schedule``, from 0."""
    return lambda version: (version + 1) / versions if version < versions else schedule(version - versions)


def _step_of(recipe: Recipe) -> Schedule:
    return step(recipe.schedule_rounds or 1, recipe.schedule_decay)


def _cosine_of(recipe: Recipe) -> Schedule:
    return cosine(max(1, (recipe.schedule_rounds or 1) - recipe.warmup_rounds), recipe.schedule_floor)


#: Name in the configuration, and what makes the schedule from a recipe.
SCHEDULES: Parts[Callable[[Recipe], Schedule]] = Parts(
    "schedule", "fedmq.schedules", {"constant": lambda _: constant, "step": _step_of, "cosine": _cosine_of}
)


def schedule_of(recipe: Recipe) -> Schedule:
    """The schedule that ``recipe`` names, after its warm-up. Raises :class:`ConfigError`."""
    schedule = made(SCHEDULES, recipe.schedule, recipe)
    return warmed_up(schedule, recipe.warmup_rounds) if recipe.warmup_rounds else schedule


def factor_at(schedule: Schedule, version: int) -> float:
    """The factor for the step from ``version``. Raises :class:`StrategyError` if it is none."""
    factor = schedule(version)
    if not 0 <= factor < math.inf:
        raise StrategyError(
            f"aggregator.schedule gave {factor!r} for version {version}; a factor is finite and not below 0"
        )
    return factor
