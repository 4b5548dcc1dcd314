"""Bad workers: what they send instead of what they trained, by ``attacks``, with all that they know.

They know the newest update of each honest worker (of a hundred, if there are more). In the literature they know all
updates of the round; here rounds overlap, and the newest is what comes closest to that.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from broker.messages import ModelSpec, TensorRole, Values, whole
from fedmq.simulation.attacks import Scene, attack_of, bad_workers
from fedmq.simulation.randomness import stream
from fedmq.simulation.scenario import AttackTable

__all__ = ["Attackers"]

Array = NDArray[Any]

#: Honest workers whose updates are remembered.
MOST_KNOWN = 100


class Attackers:
    """All bad workers of a scenario. Raises :class:`ConfigError` for an attack that there is not."""

    def __init__(self, table: AttackTable, count: int, model: ModelSpec, seed: int) -> None:
        self._attack = attack_of(table.kind)
        self._bad = bad_workers(table.share, count)
        self._generator = stream(seed, "attack")
        self._specs = [t for t in model.tensors if t.role is TensorRole.PARAMETER and "float" in t.dtype]
        self._known: dict[int, Array] = {}

    def __bool__(self) -> bool:
        return len(self._bad) > 0

    def sent(self, worker: int, tensors: Mapping[str, Values]) -> Mapping[str, Values]:
        """What ``worker`` sends after it has made ``tensors``: the same, if it is honest."""
        is_bad = worker in self._bad
        if not is_bad and worker >= MOST_KNOWN:
            return tensors
        own = np.concatenate([whole(tensors[t.name]).reshape(-1).astype(np.float32) for t in self._specs])
        if not is_bad:
            self._known[worker] = own
            return tensors
        honest = np.stack([self._known[w] for w in sorted(self._known)]) if self._known else own[None]
        with np.errstate(over="ignore"):  # what is not finite is sent, too
            bad = self._attack(Scene(own=own, honest=honest, bad=len(self._bad), generator=self._generator))
        result, start = dict(tensors), 0
        for spec in self._specs:
            values = whole(tensors[spec.name])
            result[spec.name] = bad[start : start + values.size].reshape(values.shape).astype(values.dtype)
            start += values.size
        return result
