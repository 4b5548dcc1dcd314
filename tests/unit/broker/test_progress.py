"""Bars where somebody looks, and nothing elsewhere."""

from __future__ import annotations

import io
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from rich.console import Console

from broker import progress
from broker.progress import bar
from tests.support.commands import PATIENCE, environment_of
from tests.support.terminal import on_terminal

#: Waits for the bar, if there is to be one, and has it drawn.
SLOW = """
import sys, time
from broker import progress
from broker.console import say

progress.DELAY_SECONDS = 0.01
progress.show_deep()
with progress.bar("counting [bold]", total=3, unit="steps", is_deep=True) as step:
    limit = time.monotonic() + 30
    while sys.stderr.isatty() and not progress._board.tasks and time.monotonic() < limit:
        time.sleep(0.01)
    step()
    if sys.stderr.isatty():
        progress._board.refresh()
say("result")
"""


def test_on_a_terminal_there_is_a_bar_which_goes_again(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW)

    code, shown = on_terminal(tmp_path, program="slow")

    assert code == 0, shown
    assert "counting [bold]" in shown
    assert "1 of 3 steps" in shown
    # The line of the bar is erased, and the result stands alone.
    assert shown.rindex("\x1b[2K") > shown.rindex("1 of 3 steps")
    assert shown.rstrip().endswith("result")


@pytest.mark.parametrize("more", [{}, {"FORCE_COLOR": "1"}])
def test_in_a_pipe_there_is_nothing(tmp_path: Path, more: dict[str, str]) -> None:
    (tmp_path / "slow.py").write_text(SLOW)
    environment = environment_of(None, more)
    del environment["NO_COLOR"]

    done = subprocess.run(
        [sys.executable, "-m", "slow"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=True,
    )

    assert (done.stdout, done.stderr) == ("result\n", "")


def test_where_nobody_looks_no_thread_is_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "errors", Console(file=io.StringIO()))
    before = threading.active_count()
    with bar("x", total=3) as step:
        step()
        step.say(3, 4, "y")
        assert threading.active_count() == before


def test_what_is_soon_done_shows_no_bar() -> None:
    shown = progress.Bar("x", 3, "")
    shown._begin()
    shown(2)
    shown._end()
    shown._appear()  # the timer was late

    assert not progress._board.tasks
    assert shown.done == 2
