"""What benchmarks/accuracy.py learns: tasks of the product, whose seed can be set from outside."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from worker_client.tasks.digits import Digits
from worker_client.tasks.text import Text

__all__ = ["Characters", "Images", "sow"]


class Images(Digits):
    """Handwritten digits, unlike for each worker."""


class Characters(Text):
    """The task of ``worker_client.tasks.text``, smaller, with the share of characters that it gets right."""

    def __init__(self) -> None:
        super().__init__(width=64, layers=2, heads=4, length=64)

    def metrics(self, model: nn.Module, batch: Any) -> dict[str, float]:
        """Whether the most likely character is the one that comes."""
        inputs, targets = batch
        with torch.no_grad():
            return {"accuracy": (model(inputs).argmax(-1) == targets).float().mean().item()}


def sow(seed: int) -> None:
    """From here on models, shards and batches are drawn from ``seed``."""
    Images.seed = Characters.seed = seed
