from __future__ import annotations

import pytest

from broker.seldom import Seldom


def test_a_thing_is_said_once_in_a_while_and_another_thing_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr("broker.seldom.time.monotonic", lambda: clock[0])
    seldom = Seldom(30)

    assert [seldom.may("full"), seldom.may("full"), seldom.may("away")] == [True, False, True]
    clock[0] += 29.9
    assert not seldom.may("full")
    clock[0] += 0.1
    assert [seldom.may("full"), seldom.may("full")] == [True, False]


def test_the_first_word_comes_at_once_even_on_a_machine_that_has_just_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("broker.seldom.time.monotonic", lambda: 1.0)
    assert Seldom(30).may("full")
