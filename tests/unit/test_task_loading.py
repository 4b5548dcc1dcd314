from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from broker.errors import TaskError
from worker_client.loading import load_task
from worker_client.task import Task
from worker_client.tasks.digits import Digits

SOURCE = """
from worker_client.task import Task

class Mine(Task):
    pass

instance = Mine()
number = 5

def factory():
    return Mine()

def wrong():
    return 5

def broken():
    raise ValueError("no such folder")
"""


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A working directory with a module of the user's."""
    (tmp_path / "my_task_module.py").write_text(SOURCE)
    (tmp_path / "my_broken_module.py").write_text("import json\n\nx = 1 / 0\n")
    (tmp_path / "my_needy_module.py").write_text("import package_that_is_not_installed\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        del sys.modules[name]


@pytest.mark.parametrize("attribute", ["Mine", "instance", "factory"])
def test_a_subclass_an_instance_and_a_factory_are_tasks(attribute: str) -> None:
    task = load_task(f"my_task_module:{attribute}")

    assert isinstance(task, Task)
    assert type(task).__name__ == "Mine"


def test_the_built_in_task_is_found() -> None:
    assert isinstance(load_task("worker_client.tasks.digits:Digits"), Digits)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_task_module", "name it as package.module:attribute"),
        (":Mine", "name it as package.module:attribute"),
        ("my_task_modul:Mine", r"no module 'my_task_modul' \(did you mean 'my_task_module'"),
        ("worker_client.tasks.digit:Digits", r"did you mean 'digits'\?"),
        ("my_task_module:Mime", r"has no attribute 'Mime' \(did you mean 'Mine'"),
        ("my_task_module:number", "is a int; it must be a Task"),
        ("my_task_module:wrong", "gave a int"),
        ("my_task_module:broken", r"raised ValueError: no such folder \(my_task_module.py:17\)"),
        ("my_broken_module:x", r"importing my_broken_module raised ZeroDivisionError.*\(my_broken_module.py:3\)"),
        ("my_needy_module:x", r"No module named 'package_that_is_not_installed' \(my_needy_module.py:1\)"),
        ("worker_client.task:Task.missing", "has no attribute 'missing'"),
    ],
)
def test_a_name_that_means_no_task_is_explained(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message):
        load_task(name)
