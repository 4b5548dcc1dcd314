"""When it is over, apart from what a whole machine does until then."""

from __future__ import annotations

from typing import Any

import pytest

from aggregator.core.ending import LAST_FIGURES, Ending

QUIET: dict[str, Any] = {"is_settled": True, "is_done": True, "is_alone": True, "linger": 30.0}


def ending(**state: Any) -> Ending:
    return Ending(100.0, 100.0, **{"was_announced": True, **state})


@pytest.mark.parametrize(
    ("state", "changes", "reason"),
    [
        ({}, {}, "done"),
        ({}, {"is_settled": False}, None),
        ({}, {"is_done": False}, None),
        ({}, {"is_alone": False}, None),
        ({"was_announced": False}, {}, None),
        ({"was_announced": False, "is_stopping": True}, {}, "done"),
        ({"is_stopping": True}, {"is_done": False, "is_alone": False}, "stopped"),
        ({"is_stopping": True}, {"is_done": False, "is_settled": False}, None),
    ],
)
def test_what_is_waited_for(state: dict[str, Any], changes: dict[str, Any], reason: str | None) -> None:
    assert ending(**state).come(101.0, **QUIET | changes) == reason


def test_nobody_is_waited_for_longer_than_that() -> None:
    lingering = ending()

    assert lingering.come(129.9, **QUIET | {"is_alone": False}) is None
    assert lingering.come(130.0, **QUIET | {"is_alone": False}) == "done"
    assert lingering.times(30.0) == [130.0, 100.0 + LAST_FIGURES]


def test_a_full_disk_keeps_nobody_who_was_told_to_leave() -> None:
    staying, leaving = ending(), ending(is_stopping=True)
    staying.give_up()
    leaving.give_up()

    assert staying.come(101.0, **QUIET | {"is_settled": False}) is None
    assert leaving.come(101.0, **QUIET | {"is_settled": False}) == "stopped"


def test_the_end_comes_once() -> None:
    once = ending()

    assert [once.come(101.0, **QUIET) for _ in range(2)] == ["done", None]
