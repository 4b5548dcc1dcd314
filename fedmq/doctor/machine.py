"""What the doctor makes of this machine: packages, the run's folder and its disk, torch, the task."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from fedmq.doctor.findings import Finding, note, ok, problem

__all__ = ["installed", "meets", "of_folder", "of_packages", "of_room", "of_torch"]

#: Less than this is too little for anything.
LITTLE_BYTES = 100_000_000
#: Checkpoints that are kept, the one that is written, a round's rows, the results.
VERSIONS = 8

REQUIREMENT = re.compile(r"^([A-Za-z0-9._-]+)(?:\[[^\]]*\])?\s*([<>=!~0-9.,\s*]*)\s*(?:;.*)?$")
CONDITION = re.compile(r"^(>=|<=|==|!=|<|>)\s*([0-9][0-9.]*)$")


def of_packages(requirements: Iterable[str], versions: Mapping[str, str]) -> list[Finding]:
    """Whether what is installed (``versions``, by name) is what fedmq asks for; those of extras are left out."""
    found: list[Finding] = []
    met: list[str] = []
    for requirement in requirements:
        match = REQUIREMENT.match(requirement)
        if match is None or "extra ==" in requirement:
            continue
        name, conditions = match.group(1), match.group(2).strip()
        version = versions.get(name)
        command = f'python -m pip install "{name}{conditions}"'
        if version is None:
            found.append(problem("python", f"the package {name} is not installed", command))
        elif not meets(version, conditions):
            found.append(problem("python", f"{name} {version} is installed; fedmq is for {conditions}", command))
        else:
            met.append(f"{name} {version}")
    return [*found, ok("python", f"packages: {', '.join(met)}")] if met else found


def meets(version: str, conditions: str) -> bool:
    """Whether ``version`` meets conditions like ``>=1.4,<2``; True for those that cannot be read."""
    mine = _numbers(version)
    for text in filter(None, (part.strip() for part in conditions.split(","))):
        match = CONDITION.match(text)
        if match is None:
            continue
        operator, theirs = match.group(1), _numbers(match.group(2))
        length = max(len(mine), len(theirs))
        a, b = mine + (0,) * (length - len(mine)), theirs + (0,) * (length - len(theirs))
        holds = {">=": a >= b, "<=": a <= b, "==": a == b, "!=": a != b, "<": a < b, ">": a > b}
        if not holds[operator]:
            return False
    return True


def installed(name: str = "fedmq") -> tuple[list[str], dict[str, str]]:
    """What the package asks for, and which version of each is installed."""
    try:
        requirements = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return [], {}
    versions: dict[str, str] = {}
    for requirement in requirements:
        if match := REQUIREMENT.match(requirement):
            try:
                versions[match.group(1)] = importlib.metadata.version(match.group(1))
            except importlib.metadata.PackageNotFoundError:
                continue
    return requirements, versions


def of_folder(folder: Path, *, model_bytes: int) -> list[Finding]:
    """Whether an aggregator could keep a run here; ``model_bytes`` is 0 if the run is not here."""
    place = folder
    while not place.exists() and place != place.parent:
        place = place.parent
    if not place.is_dir():
        return [problem("disk", f"{place} is no folder", "choose another --folder")]
    if not os.access(place, os.W_OK | os.X_OK):
        return [
            problem("disk", f"{place} cannot be written to: an aggregator has no room here", f"chown or chmod {place}")
        ]
    return of_room(str(place.resolve()), shutil.disk_usage(place).free, model_bytes=model_bytes)


def of_room(place: str, free: int, *, model_bytes: int) -> list[Finding]:
    """Whether ``free`` bytes are enough for checkpoints of a model of ``model_bytes``."""
    text = f"{free / 1e9:,.1f} GB are free in {place}"
    if free < max(LITTLE_BYTES, 2 * model_bytes):
        return [problem("disk", f"{text}: no checkpoint can be written soon", "make room, or choose another --folder")]
    if free < max(10 * LITTLE_BYTES, VERSIONS * model_bytes):
        return [note("disk", f"{text}; checkpoints take some {VERSIONS} times the model", "make room")]
    return [ok("disk", text)]


def of_torch() -> list[Finding]:
    """Whether torch is there, without importing it. Only workers need it."""
    if importlib.util.find_spec("torch") is None:
        return [note("task", "torch is not installed: no worker can run here", 'python -m pip install "fedmq[torch]"')]
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        version = "of an unknown version"
    return [ok("task", f"torch {version} is installed")]


def _numbers(version: str) -> tuple[int, ...]:
    """The release of a version: ``2.13.0+cpu`` is (2, 13, 0)."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match.group().split(".")) if match else ()
