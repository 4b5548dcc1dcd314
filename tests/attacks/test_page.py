"""docs/security.md tells of the attacks that are tried, and of tests that are there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.attacks.page import PAGE, rows, with_table
from tests.attacks.table import Attack

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_table() -> None:
    """If not: python -m tests.attacks.page."""
    assert PAGE.read_text() == with_table(PAGE.read_text())
    assert PAGE.read_text().count("| `") > 40


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
def test_the_test_of_an_attack_is_there(row: Attack) -> None:
    file, _, name = row.test.partition("::")
    source = (ROOT / file).read_text()

    assert re.search(rf"^def {re.escape(name.partition('[')[0])}\(", source, re.MULTILINE), row.test


def test_no_two_attacks_have_one_name() -> None:
    names = [row.name for row in rows()]
    assert len(names) == len(set(names)) >= 60
