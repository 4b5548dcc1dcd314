"""The aggregator's ledger, where a snapshot costs nothing.

A checkpoint on disk lists all workers, and to make that list takes as long as to write it. A simulated checkpoint is
looked at only after a simulated crash. So it remembers how long the journal was, and the list is made then.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from aggregator.core.ledger import Ledger, PlainLedger
from broker.messages import UpdateId

__all__ = ["JournaledLedger"]


class JournaledLedger(Ledger):
    """A ledger that also knows in which order the newest ids came."""

    __slots__ = ("_forgotten", "_journal")

    def __init__(self, intervals: PlainLedger | None = None) -> None:
        """``intervals`` is what :meth:`to_plain` gave."""
        super().__init__(intervals)
        self._journal: list[UpdateId] = []
        self._forgotten = 0

    def add(self, update_id: UpdateId) -> None:
        """As :meth:`Ledger.add`."""
        super().add(update_id)
        self._journal.append(update_id)

    def to_plain(self) -> PlainLedger:
        """The ledger as it is now; made when it is first looked at, which is possible until :meth:`forget`."""
        return _AsItWas(self, self._forgotten + len(self._journal))

    def forget(self, snapshot: PlainLedger) -> None:
        """Nobody will look at an older state than ``snapshot``."""
        if isinstance(snapshot, _AsItWas):
            del self._journal[: snapshot.length - self._forgotten]
            self._forgotten = snapshot.length

    def _at(self, length: int) -> PlainLedger:
        """The state when ``length`` ids had been added."""
        if length < self._forgotten:
            raise ValueError("this state of the ledger was forgotten")
        state = Ledger(super().to_plain())
        for update_id in self._journal[length - self._forgotten :]:
            state.discard(update_id)
        return state.to_plain()


class _AsItWas(Mapping[str, Mapping[str, list[list[int]]]]):
    def __init__(self, ledger: JournaledLedger, length: int) -> None:
        self.length = length
        self._ledger = ledger
        self._plain: PlainLedger | None = None

    def _made(self) -> PlainLedger:
        if self._plain is None:
            self._plain = self._ledger._at(self.length)  # noqa: SLF001 - of the same module
        return self._plain

    def __getitem__(self, worker: str) -> Mapping[str, list[list[int]]]:
        return self._made()[worker]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made())

    def __len__(self) -> int:
        return len(self._made())
