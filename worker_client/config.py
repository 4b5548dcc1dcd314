"""``[worker]``: what one worker is called, what it trains on, and how."""

from __future__ import annotations

import hashlib
import re
import socket
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from broker.errors import ConfigError
from broker.settings import Table, listed
from broker.topology import check_name

__all__ = ["WorkerConfig", "host_name", "shard_of"]


def host_name() -> str:
    """This machine's name, as a worker's name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", socket.gethostname()).strip("-")[:64] or "worker"


def shard_of(text: str, worker: str) -> tuple[int, int]:
    """Index (from 0) and count of the shard ``text``, which is like ``2/4`` or ``auto/4``.

    ``auto`` takes the index from a hash of the worker's name; two workers may get the same one.
    Raises ValueError if ``text`` is neither.
    """
    match = re.fullmatch(r"(auto|\d{1,9})/(\d{1,9})", text)
    count = int(match[2]) if match else 0
    if match is None or count < 1 or (match[1] != "auto" and int(match[1]) >= count):
        raise ValueError("a shard is like 0/4 (the first of four: the index counts from 0) or auto/4")
    if match[1] == "auto":
        return int.from_bytes(hashlib.sha256(worker.encode()).digest()[:8], "big") % count, count
    return int(match[1]), count


def _checked_name(name: str) -> str:
    return check_name("worker.name", name)


def _checked_shard(text: str) -> str:
    shard_of(text, "")
    return text


class WorkerConfig(Table):
    """``[worker]``: what one worker is called, what it trains on, and how."""

    name: Annotated[str, AfterValidator(_checked_name)] = Field(default_factory=host_name)
    """The worker's name, one for each worker of a run; the host's name if not set."""
    task: str = "worker_client.tasks.digits:Digits"
    """What is trained, as ``package.module:attribute`` (the working directory is importable), or as an installed
    package calls it."""
    shard: Annotated[str, AfterValidator(_checked_shard)] = "0/1"
    """Which part of the task's data is this worker's: ``2/4`` (index from 0), or ``auto/4`` (by the name)."""
    folder: Path | None = None
    """Where identity and sequence are kept; ``runs/<run>/workers/<name>`` from the command line."""
    local_parameters: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    """Parameters that stay with this worker, as patterns like ``["head.*"]``: they train along and are never sent. The
    same for all workers of a run, from ``fedmq init`` on."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of this worker's data that it does not train on but evaluates versions with, in runs that ask for it
    (``aggregator.evaluate_every``)."""
    local_epochs: Annotated[int, Field(ge=1, le=10_000)] = 1
    """Passes over the shard for one delta."""
    local_steps: Annotated[int, Field(ge=1, le=10_000_000)] | None = None
    """Batches for one update, instead of ``local_epochs``; for a gradient, instead of the whole shard."""
    batch_size: Annotated[int, Field(ge=1, le=1_000_000)] = 32
    """Examples in one batch."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """The local optimiser; it starts afresh with each update."""
    learning_rate: Annotated[float, Field(gt=0, le=1000)] = 0.05
    """Step size of the local optimiser."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Momentum of ``sgd``."""
    weight_decay: Annotated[float, Field(ge=0, le=1000)] = 0.0
    """Weight decay of the local optimiser."""
    clip_norm: Annotated[float, Field(gt=0)] | None = None
    """Largest norm of a gradient: of each local step's, or of the one that is published."""
    device: Annotated[str, Field(pattern=r"^(auto|cpu|mps|cuda(:\d+)?)$")] = "auto"
    """``cpu``, ``cuda``, ``cuda:1``, ``mps``; ``auto`` takes a GPU if there is one."""
    threads: Annotated[int, Field(ge=1, le=1024)] = 1
    """CPU threads of one torch operation; one, so that several workers on a machine do not fight."""
    delay: Annotated[float, Field(ge=0, le=86_400)] = 0.0
    """Seconds to add to each update: a slow worker for demonstrations and tests."""
    heartbeat_seconds: Annotated[float, Field(gt=0, le=3600)] = 2.0
    """Seconds between two heartbeats."""
    max_updates: Annotated[int, Field(ge=1)] | None = None
    """Leave after so many updates."""

    signing_key_file: Path | None = None
    """Private key with which everything that this worker says is signed. See docs/signatures.md."""
    aggregator_keys_file: Path | None = None
    """Public keys of aggregators: only versions and notices that one of these has signed are believed. Read again when
    it changes."""

    def require_whole_model(self, who: str) -> None:
        """Raise :class:`ConfigError` if some of the model is with the workers, where ``who`` would need it."""
        if self.local_parameters:
            raise ConfigError(
                f"{who} has no parameters of its own, and worker.local_parameters are with the workers: let these "
                "evaluate (aggregator.evaluate_every, worker.validation_fraction)"
            )
