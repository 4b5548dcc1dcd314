"""The table of attacks as docs/security.md shows it: ``python -m tests.attacks.page`` puts it there."""

from __future__ import annotations

from pathlib import Path

from tests.attacks import others, outsiders, workers
from tests.attacks.table import ATTACKS, ELSEWHERE, Attack

__all__ = ["PAGE", "rows", "with_table"]

PAGE = Path(__file__).parents[2] / "docs" / "security.md"
BEGIN, END = "<!-- attacks: made by `python -m tests.attacks.page` -->", "<!-- end of attacks -->"
DEEDS = (outsiders, workers, others)


def rows() -> list[Attack]:
    """All attacks, those of the deeds first."""
    return [*ATTACKS.values(), *ELSEWHERE]


def with_table(page: str) -> str:
    """``page`` with the table between its marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    lines = ["| who | does what | stopped by | with | by means of | test |", "| --- | --- | --- | --- | --- | --- |"]
    lines += [
        f"| {row.who} | {row.what} | {row.by} | {_code(row.answer)} | {row.mechanism} | {_test(row)} |"
        for row in rows()
    ]
    return f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}"


def _code(answer: str) -> str:
    return f"`{answer}`" if answer[:3].isdecimal() or (" " not in answer and "`" not in answer) else answer


def _test(row: Attack) -> str:
    file, _, name = row.test.partition("::")
    return f"`{row.name}`" if row.deed is not None else f"[{name.removeprefix('test_').replace('_', ' ')}](../{file})"


if __name__ == "__main__":
    PAGE.write_text(with_table(PAGE.read_text()))
