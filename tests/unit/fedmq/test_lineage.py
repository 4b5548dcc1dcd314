"""``fedmq history | replay | rollback`` as a user meets them, on a run's folder."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

from fedmq.cli import app
from tests.support.builders import RUN
from tests.support.commands import Done, assert_one_message, fedmq
from tests.support.ondisk import OnDisk

Give = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path) -> OnDisk:
    """Three versions, an update of c in the last two, and one of a in the buffer."""
    run = OnDisk(tmp_path / "runs" / RUN, {"w": np.arange(3, dtype=np.float32)}, buffer_size=3)
    run.round("a", "b", "a", "a", "c", "b")
    run.order(learning_rate=0.5)
    run.round("a", "b", "c", "a")
    run.tick(100)
    run.settle()
    run.close()
    return run


@pytest.fixture
def give(tmp_path: Path) -> Give:
    return lambda *arguments: fedmq(tmp_path, *arguments, "--run", RUN, url=None)


def test_the_history_is_shown_as_a_table_in_full_and_as_json(run: OnDisk, give: Give) -> None:
    rows = give("history").out.splitlines()
    assert rows[0].split()[:2] == ["version", "time"]
    assert "an aggregator took up the run: epoch 1" in rows[1]
    assert "a (2), b" in rows[2]
    assert "3 earlier ones" in give("history", "--limit", "1").out

    full = give("history", "--version", "3").out
    assert run.lines()[2]["before"] in full
    assert "learning_rate=0.5" in full
    assert "c/i/1" in full
    mine = give("history", "--worker", "c").out
    assert mine.count("1 of 3") == 2

    lines = json.loads(give("history", "--json").out)
    for line in lines:  # which the file has in seconds
        line["time"] = datetime.fromisoformat(line["time"]).timestamp()
    assert lines == run.lines("start") + run.lines()
    (line,) = json.loads(give("history", "--json", "--limit", "1").out)
    assert line["version"] == 3
    assert_one_message(give("history", "--version", "9"), 2, "knows no version 9; its newest version is 3")
    assert_one_message(give("history", "--worker", "x"), 2, "knows no update of 'x'")


def test_a_version_is_rebuilt_and_written(run: OnDisk, give: Give, tmp_path: Path) -> None:
    told = give("replay", "--version", "2", "-o", "two.safetensors")

    assert told.code == 0
    assert f"digest {run.lines()[1]['after']}" in told.out
    two = next(run.store.read(file) for file in run.store.files() if run.store.read(file).version == 2)
    np.testing.assert_array_equal(load_file(tmp_path / "two.safetensors")["w"], two.parameters["w"])
    without = give("replay", "--without", "c", "--without", "b").out
    assert "without b, c: 5 updates left out, in versions 1-3" in without
    assert "at a distance (L2) of" in without


def test_what_makes_no_sense_is_refused_and_changes_nothing(run: OnDisk, give: Give, tmp_path: Path) -> None:
    before = sorted(file.name for file in run.store.folder.iterdir())

    assert_one_message(give("replay", "--without", "x"), 2, "no update of x made version 3", "some of a, b, c")
    assert_one_message(give("replay", "--version", "9"), 5, "there is no version 9; the newest is 3")
    assert_one_message(give("replay", "--version", "1", "-o", "no/where"), 5, "no/where", "choose another --output")
    assert_one_message(give("replay", "--adopt", "--yes"), 2, "nothing to adopt: name --version or --without")
    assert_one_message(give("replay", "--version", "3", "--adopt", "--yes"), 2, "version 3 is the newest already")
    assert_one_message(give("replay", "--without", "c", "--adopt"), 2, "give --yes")
    assert_one_message(give("rollback", "1"), 2, "give --yes")
    assert_one_message(give("rollback", "3", "--yes"), 2, "version 3 is not an earlier one: the newest is 3")
    elsewhere = fedmq(tmp_path, "rollback", "1", "--yes", "--run", "nobodys", url=None)
    assert_one_message(elsewhere, 5, "no checkpoint of run 'nobodys'", "name the run with --run")
    # Before anybody is asked, or anything rebuilt.
    assert_one_message(give("rollback", "7"), 2, "version 7 is not an earlier one")
    assert_one_message(
        give("replay", "--without", "c", "--without", "x", "--adopt"), 2, "no update of x made version 3"
    )

    assert sorted(file.name for file in run.store.folder.iterdir()) == before


def test_a_rollback_takes_a_checkpoint_or_the_kept_updates_or_says_what_there_is(run: OnDisk, give: Give) -> None:
    told = give("rollback", "2", "--yes").out
    assert "version 2 from a checkpoint" in told
    assert "is version 2 again; 3 updates of version 3 no longer count; 1 in the buffer dropped" in told
    for file in run.store.files():
        if run.store.read(file).version < 3:
            file.unlink()

    told = give("rollback", "1", "--yes").out
    assert "version 1 rebuilt from version 0" in told
    assert (
        f"version 5 of run '{RUN}' is version 1 again; 3 updates of version 2 no longer count; 0 in the buffer" in told
    )
    assert run.store.load().digest == run.lines()[0]["after"]

    next((run.folder / "updates").glob("*.log")).unlink()
    assert_one_message(
        give("rollback", "2", "--yes"), 5, "version 2 was made of a/i/2, b/i/1, c/i/0", "can be: 0;", "there of 3-5"
    )


def test_what_is_adopted_is_the_newest_version(run: OnDisk, give: Give) -> None:
    told = give("replay", "--without", "c", "--adopt", "--yes").out

    assert "is version 3 without c; 2 updates of versions 2-3 no longer count; 1 in the buffer dropped" in told
    assert "what c sends from now on counts again" in told
    newest = run.store.load()
    assert (newest.version, newest.records[-1].without, newest.void) == (4, ("c",), ((2, 3),))
    shown = give("history", "--version", "4").out
    assert "taken back to version 3 without c; 1 update dropped" in shown
    assert "all versions since agree" in give("replay").out
    found = json.loads(give("replay", "--version", "1", "--adopt", "--yes", "--json").out)["adopted"]
    # Without those of c, which had been taken back before.
    assert (found["version"], found["source"]) == (5, 1)
    assert found["taken_back"] == {"updates": 4, "versions": [2, 3]}
    assert json.loads(give("rollback", "4", "--yes", "--json").out)["version"] == 6


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A command in this process, which must not set up the log of all other tests."""
    monkeypatch.setattr("fedmq.lineage.set_up_logging", lambda _: None)
    level = logging.getLogger("fedmq").level
    yield
    logging.getLogger("fedmq").setLevel(level)


@pytest.mark.usefixtures("quiet")
@pytest.mark.parametrize("arguments", [("rollback", "1"), ("replay", "--without", "c", "--adopt")])
def test_whoever_is_asked_may_say_no(
    run: OnDisk, arguments: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedmq.lineage.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True)))

    done = CliRunner().invoke(app, [*arguments, "--run", RUN], input="n\n")

    assert done.exit_code == 1
    assert "nothing was changed" in done.output
    assert run.store.load().version == 3

    assert CliRunner().invoke(app, [*arguments, "--run", RUN], input="y\n").exit_code == 0
    assert run.store.load().version == 4
