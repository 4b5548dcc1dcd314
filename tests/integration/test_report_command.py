"""``fedmq report`` and ``fedmq track`` as a user gives them, of a run that is not over."""

from __future__ import annotations

from pathlib import Path

from tests.support.builders import RUN
from tests.support.commands import assert_one_message, fedmq
from tests.support.runfolder import RunFolder


def test_a_report_of_a_run_and_its_numbers_for_a_tracker(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / RUN)
    run.start()
    for seq in range(5):
        run.update(seq)

    done = fedmq(tmp_path, "report", "--run", RUN, "--output", "it.html")
    assert (done.code, done.out) == (0, "written to it.html\n"), done.err
    assert f"Run {RUN}" in (tmp_path / "it.html").read_text()

    done = fedmq(tmp_path, "track", "tensorboard", "--run", RUN)
    # A start and two versions.
    assert done.out == f"3 lines of the history of run '{RUN}' are new to tensorboard\n", done.err
    assert list((tmp_path / "runs" / RUN / "tensorboard").glob("events.*"))


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    assert_one_message(fedmq(tmp_path, "report", "--run", "no"), 5, "no checkpoint of run 'no'")
