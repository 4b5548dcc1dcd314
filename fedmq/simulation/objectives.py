"""What simulated workers learn: the port, and the table of kinds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from broker.messages import ModelSpec, Parameters, Tensors, Values

__all__ = ["FALLS", "GROWS", "Objective", "Work"]

Array = NDArray[Any]

#: Metrics of which it is known whether more is better; of others ``run.goal`` says it.
GROWS = frozenset({"accuracy", "auc", "f1", "precision", "recall"})
FALLS = frozenset({"error", "gap", "loss", "mae", "mse", "perplexity", "rmse"})


@dataclass(frozen=True, slots=True)
class Work:
    """What came of one training."""

    tensors: Mapping[str, Values]
    """For each tensor of the model, or in a codec."""
    examples: int = 1
    metrics: Mapping[str, float] = field(default_factory=dict)
    steps: int = 0
    """Local steps; 0 if there were none, as for a gradient."""
    effort: float = 0.0
    """What they weigh together; 0 as above."""
    model: ModelSpec | None = None
    """What ``tensors`` fit, if that is more than the run's model."""
    codec: str = ""
    seed: int = 0


class Objective(Protocol):
    """A model, the workers' data, and a measure of what was learned."""

    @property
    def model(self) -> ModelSpec:
        """The tensors that travel."""

    @property
    def metric(self) -> str:
        """The one that says most."""

    def initial(self) -> dict[str, Array]:
        """What the run starts from."""

    def train(self, worker: int, base: Parameters, ordinal: int) -> Work:
        """What ``worker`` makes of ``base``: its training number ``ordinal`` from that version."""

    def score(self, tensors: Tensors) -> dict[str, float]:
        """What a version is worth."""

    def counts(self) -> Array | None:
        """Examples by worker (rows) and class (columns), for a picture of the split; None if there are none."""
