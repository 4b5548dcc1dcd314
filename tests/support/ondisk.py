"""A run in a folder, as an aggregator leaves it, without broker, threads or waiting: for tests of what is kept."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from aggregator.archive import UpdateArchive, base_file
from aggregator.checkpoint import CheckpointStore
from aggregator.config import AggregatorConfig
from aggregator.core import effects as do
from aggregator.core import events as on
from aggregator.core.controls import Order
from aggregator.core.machine import RoundMachine
from aggregator.core.snapshot import Snapshot
from aggregator.history import History
from aggregator.reign import rules_to_begin
from aggregator.spool import DiskSpool
from broker.messages import Action, Array, Mode, Reason, Scalar, Update
from broker.transport import Token
from broker.wire import decode, encode
from tests.support.builders import RUN, spec_of, update_of

__all__ = ["OnDisk"]


class OnDisk:
    """An aggregator that is told by hand what arrives and when its disk has written."""

    def __init__(
        self, folder: Path, tensors: Mapping[str, Array], *, buffers: tuple[str, ...] = (), **config: Any
    ) -> None:
        self.folder = folder
        self.store = CheckpointStore(folder / "checkpoints", RUN, keep=1000)
        self.queue: deque[Update] = deque()
        self.rejected: list[Reason] = []
        self.buffers = buffers
        self._tensors = dict(tensors)
        self._unacked: dict[Token, Update] = {}
        self._tag = self._commands = 0
        self._seq: dict[str, int] = {}
        self.store.create(spec_of(tensors, buffers), tensors, now=0.0)
        self.start(**{"keep_updates": True, "buffer_size": 2, **config})

    @property
    def version(self) -> int:
        """The newest version, durable or not."""
        return self.machine.version

    def start(self, **config: Any) -> None:
        """Claim the run as the service does; a crash of the one before, if there was one."""
        self.config = AggregatorConfig.model_validate(config)
        self.queue.extendleft(reversed(self._unacked.values()))
        self._unacked.clear()
        self._flight: do.WriteCheckpoint | None = None
        self._now = 1.0
        history = History(self.folder / "history.jsonl")
        history.mend()
        snapshot = self._keep_base(self.store.claim(version=history.last_version))
        snapshot, rules, pending = rules_to_begin(self.config, snapshot)
        self.spool = DiskSpool(self.store.folder, snapshot.epoch)
        self.machine = RoundMachine(rules, snapshot, self._now, pending=pending, spool=self.spool)
        history.open(snapshot.records, epoch=snapshot.epoch, version=snapshot.version, now=self._now)
        keeps = self.config.keep_updates
        self._archive = UpdateArchive(self.folder / "updates", snapshot.epoch) if keeps else None
        self._history = history
        self._send(on.LinkUp(1))

    def restart(self, **config: Any) -> None:
        """Die and come again, with other settings if there are any."""
        self.close()
        self.start(**{**self.config.model_dump(exclude_unset=True), **config})

    def close(self) -> None:
        """Let go of files."""
        if self._archive is not None:
            self._archive.close()

    def publish(
        self, worker: str, tensors: Mapping[str, Array], *, lag: int = 0, examples: int = 1, effort: float = 0.0
    ) -> None:
        """A worker's next update, which starts from the version that is ``lag`` before the newest."""
        seq = self._seq[worker] = self._seq.get(worker, -1) + 1
        base = max(0, self.store.load().version - lag)
        update = update_of(
            tensors,
            worker=worker,
            seq=seq,
            base_version=base,
            mode=Mode(self.config.mode),
            examples=examples,
            effort=effort,
            buffers=self.buffers,
            metrics={"loss": 0.5},
        )
        self.queue.append(update)

    def deliver(self) -> bool:
        """The next update of the queue arrives; False if there is none."""
        if not self.queue:
            return False
        self._tag += 1
        token = Token(1, self._tag)
        update = self._unacked[token] = self.queue.popleft()
        self._body = encode(update)
        read = decode(self._body)
        assert isinstance(read, Update)
        self._send(on.Arrived(token, read, len(self._body)))
        return True

    def write(self) -> bool:
        """The checkpoint that is on its way is durable; False if none is."""
        if self._flight is None:
            return False
        flight, self._flight = self._flight, None
        self._history.sync()
        if self._archive is not None:
            self._archive.sync()
        self.store.write(flight.snapshot)
        self.spool.sweep(self.store.needed_rows)
        self._send(on.CheckpointWritten(flight.commit))
        return True

    def settle(self) -> None:
        """Everything that is in the queue arrives, and all checkpoints are written."""
        while self.deliver() or self.write():
            pass

    def round(self, *workers: str, seed: int = 0, scale: float = 1.0, lag: int = 0) -> None:
        """One update of each of ``workers``, with random tensors; all is settled afterwards."""
        for worker in workers:
            self.publish(worker, self.random(seed + self._tag, scale), lag=lag)
            self.settle()

    def random(self, seed: int, scale: float = 1.0) -> dict[str, Array]:
        """Tensors like the model's."""
        source = np.random.default_rng(seed)

        def like(array: Array) -> Array:
            if array.dtype.kind == "i":
                return np.asarray(source.integers(0, 5, array.shape), array.dtype)
            largest = 6e4 if array.dtype == np.float16 else 5e18
            return np.asarray(np.clip(scale * source.standard_normal(array.shape), -largest, largest), array.dtype)

        return {name: like(array) for name, array in self._tensors.items()}

    def order(self, **changes: Scalar) -> None:
        """``fedmq set``."""
        self._commands += 1
        normal = self.config.normal({**self.machine.controls.newest, **changes})
        order = Order(normal, self.config.changed(normal).rules())
        self._send(on.Ordered(Token(1, 10**6 + self._commands), f"c{self._commands}", Action.SET, order))

    def tick(self, seconds: float) -> None:
        """Time passes."""
        self._now += seconds
        self._send(on.Tick())

    def lines(self, kind: str = "version") -> list[dict[str, Any]]:
        """The history's lines of one kind."""
        text = (self.folder / "history.jsonl").read_text()
        return [line for line in map(json.loads, text.splitlines()) if line["kind"] == kind]

    def _keep_base(self, snapshot: Snapshot) -> Snapshot:
        if not self.config.keep_updates:
            return replace(snapshot, kept_from=None)
        updates = self.folder / "updates"
        if snapshot.kept_from is not None and base_file(updates, snapshot.kept_from).exists():
            return snapshot
        self.store.save(snapshot, base_file(updates, snapshot.version))
        return replace(snapshot, kept_from=snapshot.version)

    def _send(self, event: on.Happening) -> None:
        for effect in self.machine.handle(event, self._now):
            match effect:
                case do.WriteCheckpoint():
                    self._flight = effect
                case do.Ack(token):
                    self._unacked.pop(token, None)
                case do.Reject(token, reason, _):
                    self._unacked.pop(token)
                    self.rejected.append(reason)
                case do.Record(do.Folded()) if self._archive is not None:
                    self._archive.add(self._body)
                case do.Record(do.VersionMade(record)):
                    self._history.version(record)
