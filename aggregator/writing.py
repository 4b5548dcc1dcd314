"""Checkpoints on their way to the disk, on threads of their own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from aggregator.checkpoint import CheckpointStore
from aggregator.core import events as on
from aggregator.core.snapshot import Snapshot
from broker.errors import CheckpointNotWritten, FedmqError
from broker.transport import Failed

__all__ = ["CheckpointWriter", "Outcome", "Writing"]

Outcome = on.CheckpointWritten | on.CheckpointFailed
Tell = Callable[[on.Happening | Failed], None]


@dataclass(frozen=True, slots=True)
class Writing:
    """A checkpoint that was handed over."""

    commit: int
    is_copied: threading.Event
    """Nobody reads the snapshot's accumulator any more."""
    outcome: Future[Outcome | None]
    """What the machine is told, and has been told when this is there; None if the run is over."""


class CheckpointWriter:
    """Writes one checkpoint after the other, and beside each what must be durable together with it.

    Args:
        store: where to.
        tell: takes what the machine is to know; called on the writer's threads.
    """

    def __init__(self, store: CheckpointStore, tell: Tell) -> None:
        self._store = store
        self._tell = tell
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")

    def write(
        self, commit: int, snapshot: Snapshot, *, beside: Callable[[], None], after: Callable[[Snapshot], None]
    ) -> Writing:
        """Write ``snapshot``.

        Args:
            commit: its number, for what the machine is told.
            snapshot: borrowed until ``is_copied``.
            beside: makes durable what must be so before the checkpoint counts; takes as long as the checkpoint's own
                sync, and is called at the same time. May raise :class:`CheckpointNotWritten`.
            after: called when all is durable.
        """
        is_copied = threading.Event()
        return Writing(commit, is_copied, self._writer.submit(self._write, commit, snapshot, is_copied, beside, after))

    def close(self) -> None:
        """Wait for what is on its way, and end the threads."""
        self._writer.shutdown()
        self._syncer.shutdown()

    def _write(
        self,
        commit: int,
        snapshot: Snapshot,
        is_copied: threading.Event,
        beside: Callable[[], None],
        after: Callable[[Snapshot], None],
    ) -> Outcome | None:
        def give_back() -> None:
            self._tell(on.CheckpointCopied(commit))
            is_copied.set()

        outcome: Outcome = on.CheckpointWritten(commit)
        try:
            synced = self._syncer.submit(beside)
            self._store.write(snapshot, give_back, synced.result)
            after(snapshot)
        except CheckpointNotWritten as error:
            outcome = on.CheckpointFailed(commit, str(error))
        except FedmqError as error:
            self._tell(Failed(error))
            return None
        except BaseException as error:
            self._tell(Failed(FedmqError(f"writing checkpoint {commit}: {error!r}")))
            raise
        finally:
            is_copied.set()  # whatever happened, nothing of the snapshot is read any more
        self._tell(outcome)
        return outcome
