"""How chunks are found among those of other updates: none of these may get lost, and what is spent must go."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable

import pytest

from broker.amqp.search import LOOK_PAST, Found, Message, Missing, Sought, collect, drop, is_earlier, is_sibling


class Shelf:
    """An outbox: what is given back stands where it was."""

    def __init__(self, *ids: str) -> None:
        self.ready: list[Message] = [(tag, message_id, b"%d" % tag) for tag, message_id in enumerate(ids, 1)]
        self.out: dict[int, Message] = {}
        self.most_out = 0

    async def get(self) -> Message | None:
        if not self.ready:
            return None
        message = self.ready.pop(0)
        self.out[message[0]] = message
        self.most_out = max(self.most_out, len(self.out))
        return message

    def ack(self, tag: int) -> None:
        del self.out[tag]

    def give_back(self, tags: list[int]) -> None:
        self.ready = sorted([*self.ready, *(self.out.pop(tag) for tag in tags)])

    @property
    def ids(self) -> list[str]:
        return [message_id for _, message_id, _ in self.ready]


def chunks(of: str, count: int = 2) -> list[str]:
    return [f"{of}#{index}" for index in range(count)]


def sought(of: str = "w/i/5", *, count: int = 2, spent: Iterable[str] = (), room: int = 1000) -> Sought:
    return Sought(of, count, room, lambda other, _before: other in set(spent))


def found_in(shelf: Shelf, wanted: Sought) -> Found:
    return asyncio.run(collect(shelf, wanted))


def test_chunks_in_any_order_are_found_and_nothing_else_is_touched() -> None:
    shelf = Shelf("w/i/5#1", "w/i/5#0", *chunks("w/i/6"))

    found = found_in(shelf, sought())

    assert {index: tag for index, (tag, _) in found.chunks.items()} == {1: 1, 0: 2}
    assert shelf.ids == chunks("w/i/6")
    assert sorted(shelf.out) == sorted(found.tags)


@pytest.mark.parametrize("other", ["w/i/4", "w/i/6", "w/j/0", "v/i/5", "w/i/x"])
def test_chunks_of_other_updates_that_stand_before_go_back(other: str) -> None:
    shelf = Shelf(f"{other}#0", "w/i/5#0", f"{other}#1", "w/i/5#1")

    found_in(shelf, sought())

    assert shelf.ids == chunks(other)


def test_what_is_spent_is_dropped_on_the_way() -> None:
    shelf = Shelf(*chunks("w/i/3"), *chunks("w/i/4"), *chunks("w/i/5"))

    found_in(shelf, sought(spent=["w/i/3"]))

    assert shelf.ids == chunks("w/i/4")
    assert len(shelf.out) == 2


def test_whether_they_stand_before_is_told() -> None:
    asked: list[tuple[str, bool]] = []

    def is_spent(of: str, before: bool) -> bool:
        asked.append((of, before))
        return False

    shelf = Shelf("w/h/9#0", "w/i/5#0", "w/j/0#0", "w/i/5#1")
    found_in(shelf, Sought("w/i/5", 2, 1000, is_spent))

    assert asked == [("w/h/9", True), ("w/j/0", False)]


def test_if_one_is_missing_everything_is_back_in_order() -> None:
    ids = ["w/h/9#0", "w/i/5#0", "w/i/6#0", "w/i/6#1"]
    shelf = Shelf(*ids)

    with pytest.raises(Missing, match="1 of 2 chunks"):
        found_in(shelf, sought())

    assert shelf.ids == ids
    assert not shelf.out


def test_of_doubled_chunks_the_later_counts_and_of_another_cut_none() -> None:
    shelf = Shelf("w/i/5#0", "w/i/5#7", "w/i/5#0", "w/i/5#1", "w/i/5#1")

    found = found_in(shelf, sought())

    assert {index: tag for index, (tag, _) in found.chunks.items()} == {0: 3, 1: 4}
    assert shelf.ids == ["w/i/5#1"]
    assert sorted(shelf.out) == [3, 4]


def test_messages_that_are_no_chunks_are_dropped() -> None:
    shelf = Shelf("", "something", *chunks("w/i/5"))

    found_in(shelf, sought())

    assert shelf.ids == []
    assert len(shelf.out) == 2


def test_chunks_that_are_too_large_go_back() -> None:
    shelf = Shelf(*chunks("w/i/5"))

    with pytest.raises(Missing, match="larger than the 1 bytes"):
        found_in(shelf, sought(room=1))

    assert shelf.ids == chunks("w/i/5")


def test_not_all_later_updates_are_looked_at() -> None:
    ids = chunks("w/i/6", 2 * LOOK_PAST)
    shelf = Shelf(*ids)

    with pytest.raises(Missing):
        found_in(shelf, sought())

    assert shelf.most_out == LOOK_PAST
    assert shelf.ids == ids


def test_dropping_an_update_leaves_all_others() -> None:
    ids = [*chunks("w/i/4"), *chunks("w/h/9"), *chunks("w/i/3"), *chunks("w/i/5"), *chunks("w/i/6")]
    shelf = Shelf(*ids)

    asyncio.run(drop(shelf, sought(spent=["w/i/3"])))

    assert shelf.ids == [*chunks("w/i/4"), *chunks("w/h/9"), *chunks("w/i/6")]
    assert not shelf.out


def test_dropping_ends_where_later_updates_begin() -> None:
    shelf = Shelf("w/i/5#0", *chunks("w/i/6"), "w/i/5#1")

    asyncio.run(drop(shelf, sought()))

    assert shelf.ids == [*chunks("w/i/6"), "w/i/5#1"]


def test_dropping_what_is_not_there_leaves_everything() -> None:
    shelf = Shelf(*chunks("w/h/9"))

    asyncio.run(drop(shelf, sought()))

    assert shelf.ids == chunks("w/h/9")


@pytest.mark.parametrize(
    ("of", "than", "earlier", "sibling"),
    [
        ("w/i/4", "w/i/5", True, True),
        ("w/i/10", "w/i/9", False, True),
        ("w/i/5", "w/i/5", False, True),
        ("w/h/4", "w/i/5", False, False),
        ("w/i/x", "w/i/5", False, True),
    ],
)
def test_the_order_of_updates(of: str, than: str, earlier: bool, sibling: bool) -> None:
    assert (is_earlier(of, than), is_sibling(of, than)) == (earlier, sibling)
