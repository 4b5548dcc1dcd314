"""Nothing that ships can turn bytes into running code, and the aggregator runs where torch is not installed."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("broker", "aggregator", "worker_client", "fedmq")
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))

FORBIDDEN_MODULES = {
    *{"_pickle", "cloudpickle", "code", "codeop", "copyreg", "dill", "imp", "jinja2", "joblib", "jsonpickle", "mako"},
    *{"marshal", "pickle", "pty", "runpy", "shelve", "telnetlib", "tensorflow", "xmlrpc", "zipimport"},
}
FORBIDDEN_BUILTINS = {"__import__", "breakpoint", "compile", "eval", "exec"}
FORBIDDEN_ATTRIBUTES = {
    "asyncio.create_subprocess_shell",
    "builtins.compile",
    "builtins.eval",
    "builtins.exec",
    "ctypes.pythonapi",
    "importlib.machinery.SourceFileLoader",
    "importlib.util.spec_from_file_location",
    "logging.config",
    "numexpr.evaluate",
    "numpy.loads",
    "os.popen",
    "os.system",
    "pandas.eval",
    "pandas.read_pickle",
    "pkgutil.resolve_name",
    "pydoc.locate",
    "subprocess.getoutput",
    "subprocess.getstatusoutput",
    "torch.hub.load",
    "torch.jit.load",
    "torch.load",
    "torch.package",
    "torch.serialization.load",
    "yaml.full_load",
    "yaml.load",
    "yaml.unsafe_load",
}


def dangers(source: str) -> list[str]:
    """What in ``source`` could run code from data, by the names as they were imported."""
    tree = ast.parse(source)
    aliases = dict(_aliases(tree))
    found = [name for name in aliases.values() if name.split(".")[0] in FORBIDDEN_MODULES]
    found += [name for name in aliases.values() if name in FORBIDDEN_ATTRIBUTES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _dotted(node, aliases) in FORBIDDEN_ATTRIBUTES:
            found.append(_dotted(node, aliases))
        # A reference is enough: map(eval, …) calls it too.
        if isinstance(node, ast.Name) and node.id in FORBIDDEN_BUILTINS:
            found.append(node.id)
        if isinstance(node, ast.Call):
            found += [_shown(keyword) for keyword in node.keywords if _is_open_door(keyword)]
            # What numpy did before 1.16.3, without the word: so it has to be said.
            says_no = any(keyword.arg == "allow_pickle" for keyword in node.keywords)
            if _dotted(node.func, aliases) == "numpy.load" and not says_no:
                found.append("numpy.load without allow_pickle=False")
    return found


def _aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield name.asname or name.name.split(".")[0], name.name if name.asname else name.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for name in node.names:
                yield name.asname or name.name, f"{node.module}.{name.name}"


def _dotted(node: ast.expr, aliases: dict[str, str]) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else ""


def _is_open_door(keyword: ast.keyword) -> bool:
    switches_on = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is False)
    switches_off = not (isinstance(keyword.value, ast.Constant) and keyword.value.value is True)
    return (keyword.arg in {"allow_pickle", "shell"} and switches_on) or (
        keyword.arg == "weights_only" and switches_off
    )


def _shown(keyword: ast.keyword) -> str:
    return f"{keyword.arg}={ast.unparse(keyword.value)}"


@pytest.mark.parametrize("path", FILES, ids=[str(path.relative_to(ROOT)) for path in FILES])
def test_no_shipped_file_can_run_code_from_data(path: Path) -> None:
    assert dangers(path.read_text()) == []


#: What loads code by a name, and where that name comes from: never from a message (``broker.parts`` takes a path from
#: the configuration of its own process alone, see ``may_import``).
LOADS_BY_NAME = {
    "aggregator/tracking/base.py": "a constant",
    "broker/parts.py": "the configuration, and the entry points of installed packages",
    "fedmq/__init__.py": "constants",
    "fedmq/begin.py": "constants",
    "fedmq/dashboard/beside.py": "constants",
    "fedmq/lazy.py": "the table of commands",
    "fedmq/simulation/figures.py": "constants",
    "fedmq/simulation/run.py": "constants",
    "worker_client/loading.py": "the worker's own settings",
}


def test_code_is_loaded_by_name_in_these_places_and_no_others() -> None:
    found = {str(path.relative_to(ROOT)) for path in FILES if "import_module(" in path.read_text()}
    assert found == LOADS_BY_NAME.keys()


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import marshal as m",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path)",
        "from torch import load",
        "import torch.serialization\ntorch.serialization.load(path)",
        "import yaml\nyaml.load(text)",
        "eval(text)",
        "list(map(exec, texts))",
        "__import__(name)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "import numpy as np\nnp.load(path, allow_pickle=flag)",
        "import subprocess\nsubprocess.run(text, shell=True)",
        "import os\nos.system(text)",
        "import numpy as np\nnp.load(path)",
        "from numpy import load\nload(path)",
        "import builtins\nbuiltins.eval(text)",
        "import logging.config\nlogging.config.fileConfig(path)",
        "from logging import config",
        "from importlib.util import spec_from_file_location",
        "import importlib.util\nimportlib.util.spec_from_file_location(name, path)",
        "import pkgutil\npkgutil.resolve_name(text)",
        "from subprocess import getoutput",
        "import runpy",
        "from xmlrpc.client import loads",
        "import jinja2",
    ],
)
def test_the_search_finds_what_it_looks_for(source: str) -> None:
    assert dangers(source)


@pytest.mark.parametrize(
    "source",
    [
        "import re\nre.compile(pattern)",
        "model.eval()",
        "import numpy as np\nnp.load(path, allow_pickle=False)",
        "from safetensors.numpy import load",
        "import json\njson.load(file)",
        "text = 'import pickle; eval(x)'",
    ],
)
def test_the_search_does_not_cry_wolf(source: str) -> None:
    assert dangers(source) == []


WITHOUT_TORCH = """
import importlib.abc, importlib.util, runpy, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"torch", "sklearn", "transformers", "peft", "worker_client"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""


def run_without_torch(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH + code],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


@pytest.mark.parametrize("name", ["torch", "sklearn", "worker_client"])
def test_the_refusal_refuses(name: str) -> None:
    assert f"No module named {name!r}" in run_without_torch(f"import {name}").stderr


@pytest.mark.parametrize("package", ["broker", "aggregator"])
def test_every_module_of_the_aggregators_image_imports_without_torch(package: str) -> None:
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in FILES
        if path.relative_to(ROOT).parts[0] == package and path.stem != "__main__"
    ]

    result = run_without_torch("\n".join(f"import {name}" for name in names))

    assert result.returncode == 0, result.stderr


def test_the_aggregator_starts_without_torch() -> None:
    result = run_without_torch(
        "sys.argv = ['aggregator', '--help']\nrunpy.run_module('aggregator', run_name='__main__')"
    )

    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


def test_the_command_fedmq_starts_without_torch_for_the_aggregator() -> None:
    # The aggregator's image has no torch, and its entry point is `fedmq`.
    without_torch = WITHOUT_TORCH.replace(', "worker_client"', "")
    code = "sys.argv = ['fedmq', 'aggregator', '--help']\nfrom fedmq.cli import main\nmain()"

    result = subprocess.run(
        [sys.executable, "-c", without_torch + code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout
