"""How a data set becomes batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import TensorDataset, default_collate

__all__ = ["Examples", "batch_of", "index_batches", "to_device"]


class Examples(Protocol):
    """A data set: torch's map-style ``Dataset``, or any sequence of examples."""

    def __len__(self) -> int:
        """Number of examples."""

    def __getitem__(self, index: int, /) -> Any:
        """One example: for the default ``loss``, a pair of inputs and target."""


def index_batches(length: int, size: int, generator: torch.Generator | None) -> list[list[int]]:
    """Indices 0 to ``length`` - 1 in batches of ``size``; shuffled by ``generator``, in order if None.

    A last batch of one example joins the batch before it: batch norm cannot train on one example, and
    dropping it would hide an example from small shards for good.
    """
    order = list(range(length)) if generator is None else torch.randperm(length, generator=generator).tolist()
    batches = [order[start : start + size] for start in range(0, length, size)]
    if len(batches) > 1 and len(batches[-1]) == 1 and size > 1:
        last = batches.pop()
        batches[-1] += last
    return batches


def batch_of(dataset: Examples, indices: list[int], collate: Callable[[list[Any]], Any]) -> Any:
    """The examples at ``indices`` as a batch."""
    if isinstance(dataset, TensorDataset) and collate is default_collate:
        # The same batch, cut out of the tensors at once instead of example by example: 50 times faster.
        return [tensor[indices] for tensor in dataset.tensors]
    many: Callable[[list[int]], list[Any]] | None = getattr(dataset, "__getitems__", None)
    return collate(many(indices) if many else [dataset[index] for index in indices])


def to_device(batch: Any, device: torch.device) -> Any:
    """``batch`` with every tensor in it on ``device``; lists, tuples and dicts are walked through."""
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
