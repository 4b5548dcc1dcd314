"""Small models, updates and rules for tests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from aggregator.core.rounds import Buffered, RoundRule
from aggregator.core.rules import Rules
from aggregator.core.snapshot import Snapshot
from aggregator.optimizers import Optimizer, OptimizerState, Sgd
from aggregator.staleness import polynomial
from aggregator.strategies import Accumulator, Mean, Strategy
from broker.messages import Array, Mode, ModelSpec, TensorRole, TensorSpec, Update, UpdateId, parameters_digest

RUN = "test"


def spec_of(tensors: Mapping[str, Array], buffers: tuple[str, ...] = ()) -> ModelSpec:
    """The description of ``tensors``; those named in ``buffers`` are statistics, or counters if they are integers."""

    def role(name: str, array: Array) -> TensorRole:
        if name not in buffers:
            return TensorRole.PARAMETER
        return TensorRole.COUNTER if array.dtype.kind == "i" else TensorRole.STATISTIC

    return ModelSpec(tuple(TensorSpec(n, tuple(a.shape), a.dtype.name, role(n, a)) for n, a in tensors.items()))


def snapshot_of(tensors: Mapping[str, Array], *, epoch: int = 1, buffers: tuple[str, ...] = ()) -> Snapshot:
    """A run that has just been initialised and claimed."""
    return Snapshot(
        run=RUN,
        model=spec_of(tensors, buffers),
        epoch=epoch,
        version=0,
        parameters=tensors,
        digest=parameters_digest(tensors),
        optimizer=OptimizerState({}),
        accumulator=Accumulator(),
    )


def update_of(
    tensors: Mapping[str, Array],
    *,
    worker: str = "w0",
    seq: int = 0,
    incarnation: str = "i",
    base_version: int = 0,
    base_epoch: int = 1,
    mode: Mode = Mode.DELTA,
    examples: int = 1,
    run: str = RUN,
    buffers: tuple[str, ...] = (),
    metrics: dict[str, float] | None = None,
    effort: float = 0.0,
) -> Update:
    """An update as it comes out of the decoder."""
    return Update(
        run=run,
        id=UpdateId(worker, incarnation, seq),
        base_version=base_version,
        base_epoch=base_epoch,
        mode=mode,
        examples=examples,
        metrics=metrics or {},
        effort=effort,
        model=spec_of(tensors, buffers),
        tensors=tensors,
    )


def rules_of(
    *,
    rounds: RoundRule | None = None,
    strategy: Strategy | None = None,
    optimizer: Optimizer | None = None,
    **others: Any,
) -> Rules:
    """Rules with defaults for tests: deltas, a buffer of two, FedBuff's weights, plain averaging."""
    return Rules(
        mode=others.pop("mode", Mode.DELTA),
        rounds=rounds or Buffered(size=2, max_staleness=100),
        strategy=strategy or Mean("uniform", polynomial(0.5)),
        optimizer=optimizer or Sgd(1.0),
        **others,
    )


def vector(*values: float, dtype: Any = np.float32) -> Array:
    """A tensor of rank 1."""
    return np.array(values, dtype=dtype)
