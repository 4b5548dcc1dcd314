"""The README and the pages under docs/ say what is so."""

from __future__ import annotations

import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from aggregator.config import AggregatorConfig
from broker.amqp.node import PrivateNode
from broker.messages import Reason
from broker.settings import load
from fedmq.reference import SCENARIO, TABLES, metrics_reference, reference, scenario_reference
from tests.support.waiting import wait_for
from worker_client.config import WorkerConfig
from worker_client.loading import load_task
from worker_client.training import Trainer, initial_parameters

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL)


def test_the_readmes_model_is_the_example() -> None:
    assert (ROOT / "examples" / "own_model.py").read_text() in blocks(README, "python")


def test_the_readmes_settings_are_settings(tmp_path: Path) -> None:
    (tmp_path / "fedmq.toml").write_text(blocks(README, "toml")[0])

    read = load({"aggregator": AggregatorConfig, "worker": WorkerConfig}, file=tmp_path / "fedmq.toml", environment={})

    assert read.run == "wine"


def test_the_page_of_settings_is_up_to_date() -> None:
    """If not: make docs."""
    assert (ROOT / "docs" / "configuration.md").read_text() == reference()
    assert (ROOT / "docs" / "scenario.md").read_text() == scenario_reference()
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_reference()


def test_every_setting_is_explained() -> None:
    for name, table in {**TABLES, **SCENARIO}.items():
        for key, field in table.model_fields.items():
            assert field.description, f"{name}.{key} has no docstring"


def test_every_reason_of_a_rejection_is_explained_to_operators() -> None:
    page = (ROOT / "docs" / "operating.md").read_text()
    for reason in Reason:
        assert f"`{reason.value}`" in page or reason is Reason.NOT_SUPPORTED, reason


def test_links_between_the_pages_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_guides_own_training_halves_the_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (code,) = blocks((ROOT / "docs" / "tasks.md").read_text(), "python")
    (tmp_path / "half.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.syspath_prepend(str(ROOT))
    deltas = []
    for name in ("half:HalfStep", "examples.own_model:Wine"):
        task = load_task(name)
        trainer = Trainer(task, WorkerConfig(name="w", shard="0/3", device="cpu"))
        deltas.append(trainer.train(_base(task)).tensors["1.weight"])

    torch.testing.assert_close(torch.from_numpy(deltas[0] * 2), torch.from_numpy(deltas[1]))


def test_what_the_guide_imports_is_there() -> None:
    code = "\n".join(blocks((ROOT / "docs" / "tasks.md").read_text(), "py"))
    imports = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom) and node.module != "mine"]

    assert {node.module for node in imports} >= {"fedmq", "worker_client.tasks.text", "worker_client.tasks.lora"}
    for node in imports:
        for name in node.names:
            assert hasattr(import_module(str(node.module)), name.name), ast.unparse(node)


def _base(task: Any) -> Any:
    from broker.messages import Parameters, Plan, parameters_digest  # noqa: PLC0415

    model, values = initial_parameters(task)
    return Parameters(
        run="r", epoch=1, version=0, plan=Plan(), digest=parameters_digest(values), model=model, tensors=values
    )


@pytest.mark.broker
def test_the_readmes_commands_by_hand_run_as_they_stand(node: PrivateNode, tmp_path: Path) -> None:
    """Each line of the block as a process, the broker's address apart; the workers before the aggregator."""
    (block,) = [block for block in blocks(README, "sh") if "fedmq aggregator" in block]
    lines = [shlex.split(line) for line in block.splitlines() if line.startswith("fedmq ")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FEDMQ_BROKER_URL": node.url}
    log = (tmp_path / "log").open("ab")

    def start(arguments: list[str]) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log)

    first = [line for line in lines if line[1] in ("broker", "init")]
    last = [line for line in lines if line[1] == "aggregator"]
    rest = [line for line in lines if line not in first and line not in last]
    assert (len(first), len(rest), len(last)) == (2, 4, 1)
    processes: list[subprocess.Popen[bytes]] = []
    try:
        for line in first:
            assert start(line).wait(60) == 0, (tmp_path / "log").read_text()[-3000:]
        processes += [start(line) for line in [*rest, *last]]
        for process in processes:
            assert process.wait(120) == 0, (tmp_path / "log").read_text()[-3000:]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
            process.wait()
        log.close()
    wait_for((tmp_path / "runs" / "wine" / "model.safetensors").exists, 5)
