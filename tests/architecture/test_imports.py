"""The contracts in ``.importlinter`` hold, and each of them can fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("broker", "aggregator", "worker_client", "fedmq")
COMMAND = "from importlinter.cli import lint_imports_command; lint_imports_command()"


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(folder), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, "-c", COMMAND, "--no-cache"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for package in PACKAGES:
        shutil.copytree(ROOT / package, folder / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / ".importlinter", folder)
    return folder


def test_all_contracts_are_kept() -> None:
    result = lint(ROOT)

    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("broker/settings.py", "import aggregator"),
        ("broker/messages.py", "import broker.transport"),
        ("broker/memory.py", "import pika"),
        ("broker/memory.py", "import tenacity"),
        ("broker/memory.py", "import broker.amqp"),
        ("broker/console.py", "import torch"),
        ("broker/wire/envelope.py", "import logging"),
        ("broker/messages.py", "from pathlib import Path"),
        ("aggregator/config.py", "import worker_client"),
        ("aggregator/config.py", "import torch"),
        ("aggregator/config.py", "import pika"),
        ("aggregator/core/machine.py", "import time"),
        ("aggregator/core/machine.py", "import aggregator.config"),
        ("aggregator/strategies/mean.py", "import random"),
        ("aggregator/optimizers/adam.py", "import threading"),
        ("worker_client/config.py", "import aggregator"),
        ("worker_client/config.py", "import fedmq"),
        ("worker_client/core/machine.py", "import random"),
        ("worker_client/core/machine.py", "import torch"),
        ("fedmq/dashboard/beside.py", "import uvicorn"),
    ],
)
def test_a_forbidden_import_breaks_a_contract(copy: Path, module: str, line: str) -> None:
    # Given a module with one more import
    path = copy / module
    source = path.read_text()
    path.write_text(f"{source}\n{line}\n")

    # When
    try:
        result = lint(copy)
    finally:
        path.write_text(source)

    # Then
    assert result.returncode == 1, result.stdout + result.stderr
    assert "BROKEN" in result.stdout
