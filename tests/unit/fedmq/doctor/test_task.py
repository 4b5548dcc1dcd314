"""What the doctor makes of a task."""

from __future__ import annotations

import importlib.util

import pytest

from broker.settings import Settings, load
from fedmq.doctor.command import _of_task
from fedmq.doctor.findings import Level, worst
from worker_client.config import WorkerConfig


def settings(*task: str) -> Settings:
    return load({"worker": WorkerConfig}, flags=[("worker.task", one) for one in task], environment={})


def test_a_task_is_imported_and_its_model_built() -> None:
    found = _of_task(settings("tests.support.tasks:Line"), must=True)

    assert worst(found) is Level.OK
    assert "bytes a version" in found[-1].text


def test_a_task_that_cannot_be_imported_is_a_problem_and_one_that_was_not_asked_for_none() -> None:
    found = _of_task(settings("no.such:Task"), must=False)

    assert worst(found) is Level.PROBLEM
    assert "no.such" in found[-1].text
    assert worst(_of_task(settings(), must=True)) is Level.OK


def test_without_torch_a_worker_cannot_be_and_an_aggregator_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)

    assert worst(_of_task(settings(), must=False)) is Level.NOTE
    assert worst(_of_task(settings(), must=True)) is Level.PROBLEM
