"""Quarantines in the history as a run's operator sees them."""

from __future__ import annotations

from pathlib import Path

import pytest

from aggregator.core.effects import Quarantined, Released
from aggregator.history import History
from fedmq.historydisplay import Wanted, say_history


def test_a_quarantine_and_its_end_are_told_also_when_one_worker_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "history.jsonl"
    history = History(file)
    history.standing(Quarantined("w3", 7, 5.25, 1_800_000_000.0), 1_799_996_400.0)
    history.standing(Quarantined("w4", 7, 6.0, 1_800_000_000.0), 1_799_996_400.0)
    history.standing(Released("w3", 9), 1_799_999_000.0)

    shown = say_history(file, (), Wanted(worker="w3"), limit=10)

    text = " ".join(capsys.readouterr().out.split())
    assert shown == 2
    assert "w3 is in quarantine until 2027-01-15 08:00:00 UTC: score 5.25" in text
    assert "w3 is out of quarantine" in text
    assert "w4" not in text
