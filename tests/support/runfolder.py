"""A run in a folder as an aggregator leaves it, made by the round machine, without broker or threads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.checkpoint import CheckpointStore
from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.machine import RoundMachine
from aggregator.core.rounds import Buffered
from aggregator.core.rules import CommitPolicy, Rules
from aggregator.history import History
from aggregator.optimizers import Sgd
from broker.messages import Array, Reason, Update
from broker.transport import Token
from tests.support.builders import RUN, rules_of, spec_of, update_of

__all__ = ["TENSORS", "RunFolder"]

TENSORS: Mapping[str, Array] = {
    "w": np.arange(12, dtype=np.float32).reshape(3, 4),
    "b": np.zeros(3, np.float32),
}


class RunFolder:
    """A run whose versions take two updates, and whose every update is committed at once."""

    def __init__(self, folder: Path, *, run: str = RUN, keep: int = 3) -> None:
        self.folder = folder
        self.history = History(folder / "history.jsonl")
        self.store = CheckpointStore(folder / "checkpoints", run, keep=keep)
        self.rejected: list[Reason] = []
        self.rules: Rules = rules_of(
            rounds=Buffered(size=2, max_staleness=100),
            optimizer=Sgd(0.5, momentum=0.9),
            commit=CommitPolicy(count=1),
        )
        self._tag, self._now = 0, 0.0
        self.store.create(spec_of(TENSORS), TENSORS, now=1.0)

    def start(self, *, newest: tuple[int, int] = (0, 0), now: float = 10.0, accept_older: bool = False) -> None:
        """As the service does: claim, mend the history, lead. ``newest`` are epoch and version of a broadcast."""
        self.history = History(self.folder / "history.jsonl")
        self.history.mend()
        version = max(newest[1], self.history.last_version)
        snapshot = self.store.claim(epoch=newest[0], version=version, now=now, accept_older=accept_older)
        self.machine = RoundMachine(self.rules, snapshot, now)
        self.history.open(snapshot.records, epoch=snapshot.epoch, version=snapshot.version, now=now)
        self._now = now
        self._send(on.LinkUp(1))

    def update(self, seq: int, worker: str = "w0", **more: Any) -> None:
        """An update of ones arrives, and is durable when this returns."""
        self._tag += 1
        self._now += 1.0
        ones = {name: np.ones_like(array) for name, array in TENSORS.items()}
        more = {"base_version": self.machine.version, "metrics": {"loss": 0.5}, **more}
        update: Update = update_of(ones, worker=worker, seq=seq, run=self.store.run, **more)
        self._send(on.Arrived(Token(1, self._tag), update, 100))

    def _send(self, event: on.Happening) -> None:
        for effect in self.machine.handle(event, self._now):
            match effect:
                case do.WriteCheckpoint(commit, snapshot):
                    self.history.sync()
                    self.store.write(snapshot)
                    self._send(on.CheckpointWritten(commit))
                case do.Record(do.VersionMade(record)):
                    self.history.version(record)
                case do.Reject(_, reason, _):
                    self.rejected.append(reason)
