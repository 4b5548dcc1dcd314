"""The package in docs/extending.md, installed as pip would, is found by fedmq's commands in all its parts."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from tests.support.commands import ROOT, assert_one_message, fedmq
from tests.support.package import install

PAGE = (ROOT / "docs" / "extending.md").read_text()
GROUPS = ("strategies", "optimizers", "stalenesses", "schedules", "codecs", "tasks")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the page's package in it."""
    folder = tmp_path_factory.mktemp("site")
    sources: dict[str, str] = {}
    for block in blocks("python"):
        name, code = block.removeprefix("# ").split(".py\n", 1)
        sources[name] = sources.get(name, "") + code
    (project,) = [tomllib.loads(text)["project"] for text in blocks("toml") if "[project]" in text]
    assert set(project["entry-points"]) == {f"fedmq.{group}" for group in GROUPS}
    assert set(sources) == {"fedmq_signs", "fedmq_signs_task"}
    install(folder, "fedmq_signs", sources["fedmq_signs"], project["entry-points"], project["version"])
    (folder / "fedmq_signs_task.py").write_text(sources["fedmq_signs_task"])
    return folder


def path_of(*folders: Path) -> dict[str, str]:
    return {"PYTHONPATH": ":".join(map(str, (ROOT, *folders)))}


def history(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["kind"] == "version"]


def test_a_run_of_nothing_but_the_packages_parts_and_its_replay(site: Path, tmp_path: Path) -> None:
    """Two processes, which import torch and train for a moment: nothing less shows that all parts are found."""
    (settings,) = [text for text in blocks("toml") if "[worker]" in text]
    (tmp_path / "fedmq.toml").write_text(settings)

    done = fedmq(
        tmp_path,
        *("demo", "--rounds", "3", "--set", "demo.in_process=true", "--set", "demo.slow_seconds=0"),
        *("--set", "demo.late_round=0", "--set", "demo.workers=2", "--set", "aggregator.buffer_size=2"),
        url=None,
        environment=path_of(site),
        timeout=120,
    )

    assert done.code == 0, done.err
    (folder,) = (tmp_path / "runs").iterdir()
    lines = history(folder)
    assert len(lines) == 3
    for line in lines:
        assert line["settings"]["strategy"] == "signs"
        assert line["settings"]["optimizer"] == "lion"
        assert line["settings"]["staleness"] == "half-life"
        assert line["settings"]["schedule"] == "inverse-root"
        assert line["settings"]["options"] == "0.05"
    run = ("--run", folder.name)
    replayed = fedmq(tmp_path, "replay", *run, environment=path_of(site))
    assert replayed.code == 0, replayed.err
    # Without the package, the run cannot be told how it came to be.
    gone = fedmq(tmp_path, "config")
    assert_one_message(gone, 2, "no strategy is called 'signs'", "no codec is called 'linear8'")


def test_parts_in_the_working_directory_are_named_by_their_paths(site: Path, tmp_path: Path) -> None:
    code = (site / "fedmq_signs.py").read_text()
    (tmp_path / "mine.py").write_text(code.replace("Linear8", "Mine8").replace("linear8", "mine8"))
    settings = (
        "aggregator.strategy=mine:Signs.of",
        "aggregator.optimizer=mine:Lion.of",
        "aggregator.staleness=mine:half_life",
        "aggregator.schedule=mine:inverse_root",
        "broker.codecs=mine8=mine:Mine8.of",
        "aggregator.update_codec=mine8",
    )

    done = fedmq(tmp_path, "config", *(word for pair in settings for word in ("--set", pair)))

    assert done.code == 0, done.err
    assert "mine:Signs.of" in done.out
