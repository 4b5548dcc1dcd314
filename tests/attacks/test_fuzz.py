"""A little of the fuzzing of ``make fuzz``, and that it would find something."""

from __future__ import annotations

import pytest

from tests.attacks import fuzz


def test_no_input_of_a_few_thousand_gives_anything_but_a_refusal(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz.run(3000, seed=20_261_128) == 0
    assert "3,000 inputs" in capsys.readouterr().out


def test_it_gets_behind_the_checks() -> None:
    mutator, receivers = fuzz.Mutator(7), fuzz.Receivers()
    outcomes = {receivers(mutator.next())[0] for _ in range(2000)}
    assert {"Arrived", "Announced"} <= outcomes
    assert any("topk" in text for text in outcomes)
    assert any(text.startswith("int#:") for text in outcomes)
    assert len(outcomes) > 100


def test_a_receiver_that_raises_anything_else_is_found(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def careless(_self: object, body: bytes) -> str:
        return str(body[30])

    monkeypatch.setattr(fuzz.Receivers, "_event", careless)
    assert fuzz.run(2000, seed=1) == 1
    assert "IndexError" in capsys.readouterr().out
