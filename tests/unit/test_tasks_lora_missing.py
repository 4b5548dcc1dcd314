from __future__ import annotations

import sys

import pytest

from broker.errors import TaskError
from worker_client.tasks.lora import Lora


@pytest.mark.parametrize("library", ["peft", "transformers"])
def test_without_the_libraries_the_task_says_how_to_get_them(monkeypatch: pytest.MonkeyPatch, library: str) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setitem(sys.modules, "peft", None)
    task = Lora("base", "text.txt", test_files=__file__)

    with pytest.raises(TaskError, match=r'pip install "fedmq\[llm\]"'):
        task.model() if library == "peft" else task.test_data()


@pytest.mark.parametrize("wrong", [{"rank": 0}, {"length": 1}, {"dropout": 1.0}])
def test_numbers_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(TaskError, match="rank is at least 1"):
        Lora("base", "text.txt", **wrong)  # type: ignore[arg-type]
