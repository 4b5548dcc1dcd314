"""Which update ids are in the model. The part of exactly-once that must never forget and never grow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping

from broker.messages import UpdateId

__all__ = ["Ledger", "PlainLedger", "counted"]

#: Closed intervals of sequence numbers by worker and incarnation.
PlainLedger = Mapping[str, Mapping[str, list[list[int]]]]


class Ledger:
    """A set of update ids that takes space by worker and by gap, not by update.

    Sequence numbers of one incarnation mostly come in a row, so each incarnation keeps a sorted list of
    closed intervals. Rejected updates leave gaps, which a replay from the dead letters may fill later.
    """

    __slots__ = ("_count", "_intervals")

    def __init__(self, intervals: PlainLedger | None = None) -> None:
        """``intervals`` is what :meth:`to_plain` gave."""
        self._intervals: dict[tuple[str, str], list[list[int]]] = {
            (worker, incarnation): [list(pair) for pair in pairs]
            for worker, by_incarnation in (intervals or {}).items()
            for incarnation, pairs in by_incarnation.items()
        }
        self._count = sum(last - first + 1 for pairs in self._intervals.values() for first, last in pairs)

    def __contains__(self, update_id: UpdateId) -> bool:
        pairs = self._intervals.get((update_id.worker, update_id.incarnation), [])
        index = bisect_right(pairs, update_id.seq, key=lambda pair: pair[0]) - 1
        return index >= 0 and update_id.seq <= pairs[index][1]

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[UpdateId]:
        for (worker, incarnation), pairs in sorted(self._intervals.items()):
            for first, last in pairs:
                for seq in range(first, last + 1):
                    yield UpdateId(worker, incarnation, seq)

    def add(self, update_id: UpdateId) -> None:
        """Note ``update_id``.

        Raises:
            ValueError: if it is there already; the caller must have looked.
        """
        if update_id in self:
            raise ValueError(f"update {update_id} is in the ledger already")
        self._count += 1
        pairs = self._intervals.setdefault((update_id.worker, update_id.incarnation), [])
        seq = update_id.seq
        if pairs and pairs[-1][1] == seq - 1:
            pairs[-1][1] = seq  # in a row, as nearly always
            return
        index = bisect_right(pairs, seq, key=lambda pair: pair[0])
        joins_left = index > 0 and pairs[index - 1][1] == seq - 1
        joins_right = index < len(pairs) and pairs[index][0] == seq + 1
        if joins_left and joins_right:
            pairs[index - 1][1] = pairs[index][1]
            del pairs[index]
        elif joins_left:
            pairs[index - 1][1] = seq
        elif joins_right:
            pairs[index][0] = seq
        else:
            pairs.insert(index, [seq, seq])

    def discard(self, update_id: UpdateId) -> None:
        """Forget ``update_id``, if it is there."""
        if update_id not in self:
            return
        self._count -= 1
        key, seq = (update_id.worker, update_id.incarnation), update_id.seq
        pairs = self._intervals[key]
        index = bisect_right(pairs, seq, key=lambda pair: pair[0]) - 1
        first, last = pairs[index]
        pairs[index : index + 1] = [pair for pair in ([first, seq - 1], [seq + 1, last]) if pair[0] <= pair[1]]
        if not pairs:
            del self._intervals[key]

    def to_plain(self) -> PlainLedger:
        """The ledger as dictionaries and lists, by worker and incarnation; shares nothing with it."""
        plain: dict[str, dict[str, list[list[int]]]] = {}
        for (worker, incarnation), pairs in sorted(self._intervals.items()):
            plain.setdefault(worker, {})[incarnation] = [list(pair) for pair in pairs]
        return plain


def counted(ledger: PlainLedger) -> dict[str, int]:
    """How many updates of each worker are in ``ledger``."""
    return {
        worker: sum(last - first + 1 for pairs in by_incarnation.values() for first, last in pairs)
        for worker, by_incarnation in ledger.items()
    }
