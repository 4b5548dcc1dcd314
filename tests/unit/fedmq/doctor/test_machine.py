"""What the doctor makes of this machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fedmq.doctor.findings import Level, worst
from fedmq.doctor.machine import installed, meets, of_folder, of_packages, of_room


@pytest.mark.parametrize(
    ("version", "conditions", "holds"),
    [
        ("1.4.4", ">=1.4.1,<2", True),
        ("1.4", ">=1.4.1,<2", False),
        ("2.0", ">=1.4.1,<2", False),
        ("2.0", "<=2", True),
        ("2.13.0+cpu", ">=2.2", True),
        ("1.10", ">1.9", True),
        ("1.0", "!=1.0", False),
        ("1.0", "==1", True),
        ("3", "", True),
        ("3", "~=2.0", True),
    ],
)
def test_versions_are_compared_as_numbers(version: str, conditions: str, holds: bool) -> None:
    assert meets(version, conditions) is holds


def test_packages_that_are_missing_or_of_another_version() -> None:
    wanted = ["pika<2,>=1.4.1", "numpy>=1.26", "rich>=13.7", 'torch>=2.2; extra == "torch"', "not a requirement !"]

    found = of_packages(wanted, {"pika": "1.4.4", "numpy": "1.20"})

    assert [(finding.level, finding.advice) for finding in found] == [
        (Level.PROBLEM, 'python -m pip install "numpy>=1.26"'),
        (Level.PROBLEM, 'python -m pip install "rich>=13.7"'),
        (Level.OK, ""),
    ]
    assert found[-1].text == "packages: pika 1.4.4"


def test_what_is_installed_here_is_what_fedmq_asks_for() -> None:
    assert worst(of_packages(*installed())) is Level.OK
    assert installed("no-such-package") == ([], {})


def test_room_for_checkpoints() -> None:
    assert worst(of_room("here", 50_000_000_000, model_bytes=10**9)) is Level.OK
    assert worst(of_room("here", 5_000_000_000, model_bytes=10**9)) is Level.NOTE
    assert worst(of_room("here", 1_500_000_000, model_bytes=10**9)) is Level.PROBLEM
    assert worst(of_room("here", 10_000_000, model_bytes=0)) is Level.PROBLEM


def test_a_folder_that_is_not_there_yet_is_looked_at_where_it_will_be(tmp_path: Path) -> None:
    (found,) = of_folder(tmp_path / "runs" / "digits", model_bytes=0)

    assert str(tmp_path) in found.text


def test_a_folder_that_cannot_be_written_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert worst(of_folder(tmp_path / "file" / "runs", model_bytes=0)) is Level.PROBLEM

    monkeypatch.setattr(os, "access", lambda *_arguments: False)  # root may write anywhere
    assert worst(of_folder(tmp_path, model_bytes=0)) is Level.PROBLEM
