from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from broker.errors import ConfigError
from broker.parts import Parts, _installed, names_of, part_of, register
from tests.support.package import install

Make = Callable[[], str]
GROUP = "fedmq.things"
SOURCE = """
def make():
    return "theirs"

class Holder:
    @staticmethod
    def make():
        return "held"

number = 5
"""


def parts() -> Parts[Make]:
    return Parts("thing", GROUP, {"mean": lambda: "own", "median": lambda: "own too"})


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of installed packages, on the path."""
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    before = set(sys.modules)
    _installed.cache_clear()
    yield tmp_path
    _installed.cache_clear()
    for name in set(sys.modules) - before:
        del sys.modules[name]


def test_own_names_come_first_and_installed_ones_after(site: Path) -> None:
    install(
        site, "theirs", SOURCE, {GROUP: {"other": "theirs:make", "mean": "theirs:make", "deep": "theirs:Holder.make"}}
    )

    assert part_of(parts(), "mean")() == "own"
    assert part_of(parts(), "other")() == "theirs"
    assert part_of(parts(), "deep")() == "held"
    assert names_of(parts()) == ("mean", "median", "deep", "other")


def test_a_path_is_imported_for_the_own_configuration_alone(site: Path) -> None:
    (site / "mine.py").write_text(SOURCE)
    known = parts()

    with pytest.raises(ConfigError, match=r"no thing is called 'mine:make'; there are mean, median$"):
        part_of(known, "mine:make")
    assert "mine" not in sys.modules
    assert part_of(known, "mine:make", may_import=True)() == "theirs"
    assert part_of(known, "mine:make")() == "theirs", "what the configuration has named is known from then on"


def test_the_configuration_can_give_a_path_a_name(site: Path) -> None:
    (site / "mine.py").write_text(SOURCE)
    install(site, "theirs", SOURCE, {GROUP: {"other": "theirs:make"}})
    known = parts()

    register(known, "held", "mine:Holder.make")

    assert part_of(known, "held")() == "held"
    assert names_of(known) == ("mean", "median", "other", "held")
    for taken in ("mean", "other"):
        with pytest.raises(ConfigError, match=f"thing '{taken}' is there already"):
            register(known, taken, "mine:make")
    with pytest.raises(ConfigError, match="is a int; it must be something that makes one"):
        register(known, "number", "mine:number")


def test_a_path_cannot_reach_what_stands_in_the_library() -> None:
    with pytest.raises(ConfigError, match="no thing"):
        part_of(parts(), "os:system")


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("meam", "no thing is called 'meam'; did you mean 'mean'.*; there are mean, median, or package.module:attrib"),
        ("x" * 500, f"no thing is called '{'x' * 80}'; there are"),
        ("nowhere_at_all:make", "cannot be imported: ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("mine:makes", "cannot be imported: AttributeError: .*makes"),
        ("mine:", "cannot be imported: AttributeError"),
        (":make", "cannot be imported: ValueError"),
        ("mine:number", "is a int; it must be something that makes one"),
    ],
)
def test_a_wrong_name_is_told(site: Path, name: str, complaint: str) -> None:
    (site / "mine.py").write_text(SOURCE)

    with pytest.raises(ConfigError, match=complaint):
        part_of(parts(), name, may_import=True)


def test_an_entry_point_that_fails_is_named_with_its_package(site: Path) -> None:
    install(site, "broken", "import package_that_is_not_there\n", {GROUP: {"bad": "broken:make"}}, version="2.5")

    with pytest.raises(
        ConfigError, match=r"thing 'bad', entry point broken:make of broken 2\.5, cannot be loaded: Mod"
    ):
        part_of(parts(), "bad")


def test_one_name_in_two_packages_is_no_guess(site: Path) -> None:
    install(site, "one", SOURCE, {GROUP: {"twice": "one:make"}})
    install(site, "two", SOURCE, {GROUP: {"twice": "two:make"}})

    with pytest.raises(ConfigError, match=r"two packages: (one|two):make of \w+ 1\.0 and"):
        part_of(parts(), "twice")
