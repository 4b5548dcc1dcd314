"""A worker's data in two parts: what it trains on, and what it keeps back to evaluate versions."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch.utils.data import TensorDataset

from broker.errors import TaskError
from worker_client.batches import Examples

__all__ = ["Part", "split", "usable"]


class Part:
    """Some examples of a data set.

    Args:
        whole: the data set.
        indices: which examples, in this order.
    """

    def __init__(self, whole: Examples, indices: list[int]) -> None:
        self._whole = whole
        self._indices = indices

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int, /) -> Any:
        return self._whole[self._indices[index]]


def split(data: Examples, fraction: float, key: str) -> tuple[Examples, Examples]:
    """What is left to train on, and what is held out: ``fraction`` of ``data``, at least one example of each.

    Drawn by ``key`` alone, so that the same examples are held out in every life of the worker: one that was trained on
    before would make its figures too good.

    Raises :class:`TaskError` if there is only one example.
    """
    size = len(data)
    if size < 2:
        raise TaskError("worker.validation_fraction: of a single example none can be held out; set it to 0")
    seed = int.from_bytes(hashlib.sha256(f"held out of {key}".encode()).digest()[:8], "big") >> 1
    order = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).tolist()
    count = min(size - 1, max(1, round(size * fraction)))
    held, rest = sorted(order[:count]), sorted(order[count:])
    return _part(data, rest), _part(data, held)


def _part(data: Examples, indices: list[int]) -> Examples:
    if type(data) is TensorDataset:
        # Copied once, so that batches are cut out of tensors as before.
        return TensorDataset(*(tensor[indices] for tensor in data.tensors))
    return Part(data, indices)


def usable(data: Any, complaint: str) -> Examples:
    """``data``, if it is a data set with examples in it. Raises :class:`TaskError` with ``complaint`` if not."""
    if not hasattr(data, "__len__") or not hasattr(data, "__getitem__"):
        raise TaskError(f"{complaint}: a {type(data).__name__}; it must have a length and indices (map-style)")
    if len(data) == 0:
        raise TaskError(f"{complaint}: no examples; is the shard's index right, and are there enough for all shards?")
    return data  # type: ignore[no-any-return]
