"""What is installed is pinned, all of it; an audit that was not made does not look like one that found nothing."""

from __future__ import annotations

import json
import re
import runpy
import tomllib
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.deploy import compose

ROOT = compose.ROOT
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
#: As in the Makefile.
EXTRAS = ("demo", "llm", "simulate", "tensorboard", "otel")


def wanted() -> list[Requirement]:
    project = PROJECT["project"]
    lines = [*project["dependencies"], *PROJECT["dependency-groups"]["dev"]]
    lines += [line for extra in ("torch", "dashboard", *EXTRAS) for line in project["optional-dependencies"][extra]]
    return [Requirement(line) for line in lines]


def closure(todo: list[Requirement]) -> set[str]:
    """All that is needed here in turn, as far as it is installed."""
    seen: set[tuple[str, frozenset[str]]] = set()
    while todo:
        one = todo.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in seen or key[0] == "fedmq":
            continue
        seen.add(key)
        try:
            needed = [Requirement(line) for line in distribution(one.name).requires or ()]
        except PackageNotFoundError:
            continue
        given = one.extras or {""}
        todo += [n for n in needed if n.marker is None or any(n.marker.evaluate({"extra": extra}) for extra in given)]
    return {name for name, _ in seen}


def test_what_is_installed_is_pinned_with_all_that_it_needs_in_turn() -> None:
    lines = [line for line in (ROOT / "constraints-dev.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines)
    pinned = [canonicalize_name(line.partition("==")[0]) for line in lines]
    assert len(pinned) == len(set(pinned))
    # CUDA's parts come with torch's builds for it, which pins them itself.
    needed = {name for name in closure(wanted()) if not re.match(r"(nvidia|cuda|triton)", name)}
    assert len(needed) > 60
    assert needed <= set(pinned)


def test_the_makefile_installs_these_extras() -> None:
    assert f".[{','.join(EXTRAS)}]" in (ROOT / "Makefile").read_text()


def package(name: str, *holes: str, **more: object) -> dict[str, object]:
    return {"name": name, "version": "1", "vulns": [{"id": hole, "fix_versions": []} for hole in holes], **more}


UNKNOWN = {"name": "b", "skip_reason": "not found"}


@pytest.mark.parametrize(
    ("found", "code", "words"),
    [
        ([package("a")], 0, "1 packages audited, 0 known"),
        ([package("a"), UNKNOWN], 0, "does not know them: b"),
        ([package("a", "PYSEC-1"), UNKNOWN], 1, "a 1: PYSEC-1, fixed in no release"),
        ([UNKNOWN], 0, "NOT AUDITED"),
    ],
)
def test_an_audit_says_what_it_has_found_and_what_it_has_not_looked_at(
    found: list[dict[str, Any]], code: int, words: str
) -> None:
    got, said = judge()(int(bool(code)), json.dumps({"dependencies": found}), "")
    assert got == code
    assert words in "\n".join(said)


def test_an_audit_that_was_not_made_is_told_from_one_that_has_failed() -> None:
    away = judge()(1, "", "ERROR: HTTPSConnectionPool: Max retries exceeded")
    assert (away[0], away[1][0]) == (0, "NOT AUDITED: the service cannot be reached")
    assert judge()(1, "", "ModuleNotFoundError: pip_audit")[0] == 1
    assert judge()(0, "not JSON", "")[0] == 1


def judge() -> Callable[[int, str, str], tuple[int, list[str]]]:
    names = runpy.run_path(str(ROOT / "deploy" / "audit.py"))
    judged: Callable[[int, str, str], tuple[int, list[str]]] = names["verdict"]
    return judged
