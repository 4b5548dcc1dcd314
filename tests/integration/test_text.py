"""The example ``examples/text.toml`` on a real broker, shortened."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from broker.amqp.node import PrivateNode
from fedmq import load_model
from tests.support.commands import ROOT, fedmq
from worker_client.tasks.text import ALPHABET, Text, Transformer, generate
from worker_client.training import build_model, evaluate


@pytest.mark.broker
@pytest.mark.slow
def test_the_perplexity_of_text_falls_and_the_model_writes(tmp_path: Path, node: PrivateNode) -> None:
    # When four rounds of two workers have learned from it
    short = {"worker.local_steps": 40, "aggregator.buffer_size": 2, "demo.slow_seconds": 0, "demo.late_round": 0}
    flags = [part for key, value in short.items() for part in ("--set", f"{key}={value}")]
    example = ("--config", str(ROOT / "examples" / "text.toml"), "--workers", "2", "--rounds", "4")
    done = fedmq(tmp_path, "demo", *example, *flags, url=node.url, timeout=170)

    # Then
    assert done.code == 0, done
    (run,) = (tmp_path / "runs").iterdir()
    last = json.loads((run / "summary.json").read_text())["evaluation"]["perplexity"]
    assert last < 30 < len(ALPHABET)
    model = load_model(Text(), run / "model.safetensors")
    assert isinstance(model, Transformer)
    task = Text()
    start = evaluate(task, build_model(task), task.test_data())["perplexity"]
    assert start > 2 * last
    assert evaluate(task, model, task.test_data())["perplexity"] == pytest.approx(last, rel=1e-3)
    assert len(generate(model, "The ", length=20)) == 24
