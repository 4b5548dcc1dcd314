"""What browsers are told: everything once, then changes, whoever is slow or comes back."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from fedmq.dashboard.feed import KEPT, Feed, Picture, change, cleaned, merge_patch

SCALARS = st.none() | st.booleans() | st.integers() | st.text(max_size=3)
OBJECTS = st.dictionaries(
    st.sampled_from("abc"),
    st.recursive(
        SCALARS | st.lists(SCALARS, max_size=2),
        lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    ),
    max_size=3,
)


def patched(target: Any, patch: Any) -> Any:
    """RFC 7396, as its own pseudo-code has it."""
    if not isinstance(patch, dict):
        return patch
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = patched(result.get(key), value)
    return result


def without_none(value: Any) -> Any:
    """A reader cannot tell a key that says None from one that is not there."""
    return {k: without_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


@given(OBJECTS, OBJECTS)
def test_a_patch_makes_the_one_of_the_other(before: dict[str, Any], after: dict[str, Any]) -> None:
    assert without_none(patched(before, merge_patch(before, after))) == without_none(after)


def test_what_stays_is_left_out_of_a_patch() -> None:
    before = {"workers": {"w0": {"loss": 1.0, "state": "training"}, "w1": {"loss": 2.0}}, "version": 3}
    after = {"workers": {"w0": {"loss": 0.5, "state": "training"}, "w1": {"loss": 2.0}}, "version": 3}

    assert merge_patch(before, after) == {"workers": {"w0": {"loss": 0.5}}}
    assert merge_patch(after, after) == {}


def test_json_gets_no_nan_and_no_infinity_wherever_they_are() -> None:
    value = {"loss": math.nan, "workers": [{"norm": -math.inf, "name": "w0"}], 3: (1.5, True)}

    assert cleaned(value) == {"loss": None, "workers": [{"norm": None, "name": "w0"}], "3": [1.5, True]}


POINT = st.tuples(st.integers(0, 3), st.just(0.0), st.integers(0, 2)).map(list)
CURVES = st.dictionaries(st.sampled_from(["loss", "seconds"]), st.lists(POINT, max_size=4))


@given(CURVES, CURVES)
def test_a_change_of_curves_makes_the_one_of_the_other(before: Any, after: Any) -> None:
    told = change(Picture(series=before), Picture(series=after)).get("series", {})

    series = {name: list(points) for name, points in before.items()}
    for name, tail in told.items():
        if tail is None:
            del series[name]
        else:
            series[name] = series.get(name, [])[: tail["keep"]] + tail["points"]
    assert series == after


def test_of_a_curve_that_grows_only_the_end_is_told() -> None:
    points = [[float(version), 0.0, 1.0] for version in range(1000)]
    before = Picture(series={"loss": points[:-1]}, log=[{"number": 7}])

    told = change(before, Picture(series={"loss": points}, log=[{"number": 7}, {"number": 8}]))

    assert told == {"series": {"loss": {"keep": 999, "points": [points[-1]]}}, "log": [{"number": 8}]}


# -------------------------------------------------------------------------------------------------- the streams


class World:
    """A picture that a test changes, and a feed of it that looks only when the test says so."""

    def __init__(self) -> None:
        self.picture = Picture(view={"version": 0})
        self.looks = 0
        self.feed = Feed(self._look, interval=3600, life="aaaa")

    def _look(self) -> Picture:
        self.looks += 1
        return self.picture

    async def change(self, version: int) -> None:
        self.picture = replace(self.picture, view={"version": version})
        await self.feed.whole()


async def message(stream: AsyncGenerator[bytes, None]) -> tuple[str, str, Any]:
    """Kind, id and data of the next message."""
    while True:
        text = (await asyncio.wait_for(anext(stream), 10)).decode()
        fields = dict(line.split(": ", 1) for line in text.strip().splitlines())
        if "event" in fields:
            assert text.endswith("\n\n")
            return fields["event"], fields["id"], json.loads(fields["data"])


def test_everything_comes_first_and_then_each_change() -> None:
    async def story() -> None:
        world = World()
        stream = world.feed.stream()
        kind, number, data = await message(stream)
        assert (kind, number, data["view"]) == ("whole", "aaaa-1", {"version": 0})

        await world.change(1)
        assert await message(stream) == ("change", "aaaa-2", {"view": {"version": 1}})

    asyncio.run(story())


def test_who_comes_back_gets_what_was_missed_and_nothing_twice() -> None:
    async def story() -> None:
        world = World()
        first = world.feed.stream()
        _, seen, _ = await message(first)
        await world.change(1)
        await world.change(2)

        again = world.feed.stream(seen)

        assert [(await message(again))[2]["view"]["version"] for _ in range(2)] == [1, 2]

    asyncio.run(story())


def test_who_was_away_for_too_long_or_saw_another_server_gets_everything() -> None:
    async def story() -> None:
        world = World()
        _, seen, _ = await message(world.feed.stream())
        for version in range(1, KEPT + 5):
            await world.change(version)

        for last in (seen, "bbbb-3", "aaaa-999999", "nonsense", "aaaa-", "aaaa--1", "aaaa-" + "9" * 400):
            kind, _, data = await message(world.feed.stream(last))
            assert (kind, data["view"]) == ("whole", {"version": KEPT + 4})

    asyncio.run(story())


def test_a_reader_that_does_not_read_holds_nobody_up_and_gets_everything_when_it_does() -> None:
    async def story() -> None:
        world = World()
        slow, quick = world.feed.stream(), world.feed.stream()
        await message(slow)
        await message(quick)
        for version in range(1, 3 * KEPT):
            await world.change(version)
            assert (await message(quick))[2] == {"view": {"version": version}}

        kind, _, data = await message(slow)

        assert (kind, data["view"]) == ("whole", {"version": 3 * KEPT - 1})

    asyncio.run(story())


def test_nobody_looks_while_nobody_listens_and_all_streams_end_with_the_last_word() -> None:
    async def story() -> None:
        world = World()
        running = asyncio.create_task(world.feed.run())
        await asyncio.sleep(0)
        assert world.looks == 0

        stream = world.feed.stream()
        await message(stream)
        world.picture = Picture(view={"version": 9})
        world.feed.close()

        assert (await message(stream))[2] == {"view": {"version": 9}}
        assert [part async for part in stream] == []
        assert world.feed.listeners == 0
        await asyncio.wait_for(running, 10)

    asyncio.run(story())


def test_a_stream_that_is_given_up_is_no_listener_any_more() -> None:
    async def story() -> None:
        world = World()
        stream = world.feed.stream()
        await message(stream)
        assert world.feed.listeners == 1

        await stream.aclose()  # what the server does when a browser goes

        assert world.feed.listeners == 0

    asyncio.run(story())
