"""Handwritten digits, 8 x 8 pixels, 1797 of them: small enough to train in seconds, on one CPU core.

The data set comes with scikit-learn (``pip install "fedmq[demo]"``), nothing is downloaded. One fifth is held
out. The shards of the rest have unlike mixtures of the ten digits.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils.data import TensorDataset

from broker.errors import TaskError
from worker_client.task import Shard, Task
from worker_client.tasks.partition import dirichlet, iid

__all__ = ["Digits"]


class Digits(Task):
    """Recognise the digit.

    Args:
        alpha: how unlike the shards are, see ``partition.dirichlet``; None cuts them at random.
    """

    def __init__(self, alpha: float | None = 0.3) -> None:
        self.alpha = alpha

    def model(self) -> nn.Module:
        """Two convolutions with batch norm: 10 thousand parameters."""
        return nn.Sequential(
            nn.Conv2d(1, 16, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 32, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 10),
        )

    def data(self, shard: Shard) -> TensorDataset:
        """Images of shape (1, 8, 8), float32 from 0 to 1, and digits, int64."""
        images, labels, _, _ = _split()
        if self.alpha is None:
            parts = iid(len(labels), shard.count, seed=self.seed)
        else:
            parts = dirichlet(labels, shard.count, alpha=self.alpha, seed=self.seed)
        mine = parts[shard.index]
        return _dataset(images[mine], labels[mine])

    def test_data(self) -> TensorDataset:
        """The 360 held-out images, in the same form."""
        _, _, images, labels = _split()
        return _dataset(images, labels)


def _dataset(images: NDArray[Any], labels: NDArray[Any]) -> TensorDataset:
    return TensorDataset(torch.from_numpy(images), torch.from_numpy(labels))


@cache
def _split() -> tuple[NDArray[Any], NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Images (float32, 0 to 1, one channel) and labels (int64) to train on, and the same held out."""
    try:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - an optional dependency
        from sklearn.model_selection import train_test_split  # noqa: PLC0415
    except ImportError:
        raise TaskError('the digits come with scikit-learn: pip install "fedmq[demo]"') from None
    digits = load_digits()
    images = (digits.images / 16).astype(np.float32)[:, None, :, :]
    labels = digits.target.astype(np.int64)
    train_images, test_images, train_labels, test_labels = train_test_split(
        images, labels, test_size=0.2, stratify=labels, random_state=0
    )
    return train_images, train_labels, test_images, test_labels
