"""What is public is listed, explained and importable."""

from __future__ import annotations

import ast
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("broker", "aggregator", "worker_client", "fedmq")


def modules() -> list[str]:
    names = []
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[-1] == "__init__":
                parts = parts[:-1]
            if not any(part.startswith("_") for part in parts):
                names.append(".".join(parts))
    return names


def tree(module: str) -> ast.Module:
    path = ROOT.joinpath(*module.split("."))
    path = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(path.read_text(), filename=str(path))


def defined(module: ast.Module) -> set[str]:
    return {
        node.name
        for node in module.body
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and not node.name.startswith("_")
    }


def in_order(name: str) -> tuple[int, list[int | str]]:
    kind = 0 if name.isupper() else 1 if name[:1].isupper() else 2
    return kind, [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def test_the_walk_finds_all_rooms() -> None:
    assert set(PACKAGES) <= set(modules())


@pytest.mark.parametrize("module", modules())
def test_every_public_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(tree(module))


@pytest.mark.parametrize("module", modules())
def test_every_public_name_is_listed_once_in_order_and_exists(module: str) -> None:
    names = defined(tree(module))
    listed = getattr(importlib.import_module(module), "__all__", None)

    if listed is None:
        assert not names, f"{module} defines public names but has no __all__"
        return
    assert list(listed) == sorted(set(listed), key=in_order)
    missing = [name for name in listed if not hasattr(importlib.import_module(module), name)]
    assert not missing
