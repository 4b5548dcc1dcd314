"""The front door of fedmq: ``from fedmq import Task, Shard``, and the command line.

The names are loaded when they are first used, so that an aggregator, which needs no torch, can come in by the
same door.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worker_client.context import TrainingContext, TrainingResult
    from worker_client.task import Shard, Task
    from worker_client.training import load_model

__all__ = ["Shard", "Task", "TrainingContext", "TrainingResult", "load_model"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'fedmq' has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 (only here is it needed)

    return getattr(import_module("worker_client.training" if name == "load_model" else "worker_client.task"), name)
