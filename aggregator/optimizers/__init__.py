"""Server optimisers: one file each, one line in the table."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from aggregator.optimizers.adagrad import Adagrad
from aggregator.optimizers.adam import Adam
from aggregator.optimizers.adamw import AdamW
from aggregator.optimizers.base import Optimizer, OptimizerState
from aggregator.optimizers.lamb import Lamb
from aggregator.optimizers.sgd import Sgd
from aggregator.optimizers.yogi import Yogi
from aggregator.recipe import Recipe
from broker.messages import Mode
from broker.parts import Parts, made

__all__ = [
    "OPTIMIZERS",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lamb",
    "Optimizer",
    "OptimizerState",
    "Sgd",
    "Yogi",
    "default_rate",
    "optimizer_of",
]

#: Name in the configuration, and what makes the optimiser from a recipe.
OPTIMIZERS: Parts[Callable[[Recipe], Optimizer]] = Parts(
    "optimizer",
    "fedmq.optimizers",
    {
        "sgd": Sgd.of,
        "adam": Adam.of,
        "adamw": AdamW.of,
        "yogi": Yogi.of,
        "adagrad": Adagrad.of,
        "lamb": Lamb.of,
    },
)

#: Learning rates if none is set: on deltas, and on gradients. Those of other packages have the first line's.
_RATES: Mapping[str, tuple[float, float]] = {
    "sgd": (1.0, 0.1),
    "adam": (0.01, 0.001),
    "adamw": (0.01, 0.001),
    "yogi": (0.01, 0.001),
    "adagrad": (0.1, 0.01),
    "lamb": (0.01, 0.001),
}


def default_rate(optimizer: str, mode: Mode) -> float:
    """The learning rate if none is set."""
    if mode is Mode.PARAMETERS and optimizer == "sgd":
        return 0.6  # FedAsync's alpha; the paper's experiments have values around it
    on_deltas, on_gradients = _RATES.get(optimizer, _RATES["sgd"])
    return on_gradients if mode is Mode.GRADIENT else on_deltas


def optimizer_of(recipe: Recipe) -> Optimizer:
    """The optimiser that ``recipe`` names. Raises :class:`ConfigError`."""
    return made(OPTIMIZERS, recipe.optimizer, recipe)
