"""What programs log as processes: JSON in a pipe, text on a terminal, and the same for what ends them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.support.commands import fedmq
from tests.support.terminal import on_terminal


def test_in_a_pipe_the_last_line_is_json_and_says_why_it_ends(tmp_path: Path) -> None:
    done = fedmq(tmp_path, "aggregator", "--run", "r", environment={"FEDMQ_LOG_FORMAT": "auto"})

    (line,) = [json.loads(line) for line in done.err.splitlines()]
    assert done.code == line["exit_code"] == 5
    assert (line["level"], line["role"], line["run"]) == ("error", "aggregator", "r")
    assert "fedmq init" in line["message"]


def test_on_a_terminal_it_is_text_unless_it_is_said(tmp_path: Path) -> None:
    code, shown = on_terminal(tmp_path, "aggregator", "--run", "r")
    assert code == 5
    assert "error: " in shown
    assert "{" not in shown

    code, shown = on_terminal(tmp_path, "aggregator", "--run", "r", "--log-format", "json")
    assert json.loads(shown)["exit_code"] == code == 5


def test_a_wrong_format_is_refused(tmp_path: Path) -> None:
    done = fedmq(tmp_path, "worker", "--log-format", "xml", environment={"FEDMQ_LOG_FORMAT": "human"})

    assert done.code == 2
    assert "--log-format: log.format = 'xml': 'auto', 'human' or 'json' is wanted" in done.err
