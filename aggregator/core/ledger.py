"""Which update ids are in the model. The part of exactly-once that must never forget and never grow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping

from broker.messages import UpdateId

__all__ = ["Ledger"]


class Ledger:
    """A set of update ids that takes space by worker and by gap, not by update.

    Sequence numbers of one incarnation mostly come in a row, so each incarnation keeps a sorted list of
    closed intervals. Rejected updates leave gaps, which a replay from the dead letters may fill later.
    """

    __slots__ = ("_intervals",)

    def __init__(self, intervals: Mapping[str, Mapping[str, list[list[int]]]] | None = None) -> None:
        """``intervals`` is what :meth:`to_plain` gave."""
        self._intervals: dict[tuple[str, str], list[list[int]]] = {
            (worker, incarnation): [list(pair) for pair in pairs]
            for worker, by_incarnation in (intervals or {}).items()
            for incarnation, pairs in by_incarnation.items()
        }

    def __contains__(self, update_id: UpdateId) -> bool:
        pairs = self._intervals.get((update_id.worker, update_id.incarnation), [])
        index = bisect_right(pairs, update_id.seq, key=lambda pair: pair[0]) - 1
        return index >= 0 and update_id.seq <= pairs[index][1]

    def __len__(self) -> int:
        return sum(last - first + 1 for pairs in self._intervals.values() for first, last in pairs)

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
        pairs = self._intervals.setdefault((update_id.worker, update_id.incarnation), [])
        seq = update_id.seq
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

    def to_plain(self) -> dict[str, dict[str, list[list[int]]]]:
        """The ledger as dictionaries and lists, by worker and incarnation; shares nothing with it."""
        plain: dict[str, dict[str, list[list[int]]]] = {}
        for (worker, incarnation), pairs in sorted(self._intervals.items()):
            plain.setdefault(worker, {})[incarnation] = [list(pair) for pair in pairs]
        return plain
