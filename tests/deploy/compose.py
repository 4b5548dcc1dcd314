"""Read docker-compose.yml and Dockerfile as Docker would, as far as the tests need it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
VARIABLE = re.compile(r"\$(?:\$|\{(\w+)(?::-([^}]*))?\})")


def interpolate(text: str, variables: Mapping[str, str]) -> str:
    """``${NAME:-default}`` and ``$$`` in ``text``, as Compose replaces them."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return "$"
        return variables.get(match[1]) or match[2] or ""

    return VARIABLE.sub(value, text)


def load(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """docker-compose.yml with its variables replaced, by default all unset."""

    def replaced(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: replaced(value) for key, value in node.items()}
        if isinstance(node, list):
            return [replaced(value) for value in node]
        return interpolate(node, variables or {}) if isinstance(node, str) else node

    document = replaced(yaml.safe_load((ROOT / "docker-compose.yml").read_text()))
    assert isinstance(document, dict)
    return document


def services() -> dict[str, Any]:
    """The services of docker-compose.yml."""
    result = load()["services"]
    assert isinstance(result, dict)
    return result


def stages() -> dict[str, list[tuple[str, str]]]:
    """The Dockerfile's stages, each with its instructions; the first is FROM with what it is based on."""
    text = (ROOT / "Dockerfile").read_text()
    lines = "\n".join(line for line in text.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    result: dict[str, list[tuple[str, str]]] = {}
    name = ""
    for line in filter(str.strip, lines.splitlines()):
        instruction, _, rest = line.strip().partition(" ")
        if instruction == "FROM":
            base, _, name = rest.partition(" AS ")
            rest = base
        result.setdefault(name, []).append((instruction, rest.strip()))
    return result


def lineage(stage: str) -> list[tuple[str, str]]:
    """All instructions that a stage is made of, those of the stages that it is based on first."""
    own = stages()[stage]
    base = own[0][1]
    return (lineage(base) if base in stages() else []) + own
