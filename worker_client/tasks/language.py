"""What tasks that predict the next token have in common: perplexity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import nn

from worker_client.task import Task

__all__ = ["Language"]

#: Above this e ** loss is no float any more.
LARGEST_LOSS = 700.0


class Language(Task):
    """A task whose loss is the mean cross entropy in nats a token, over batches that all have as many an example."""

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Nothing beside the loss: perplexity is no mean over batches, see :meth:`summary`."""
        del model, batch
        return {}

    def summary(self, means: Mapping[str, float]) -> dict[str, float]:
        """The mean loss and ``perplexity``, which is e to it."""
        return {**means, "perplexity": math.exp(min(means["loss"], LARGEST_LOSS))}
