from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch

from aggregator.config import AggregatorConfig
from broker.errors import TaskError
from broker.messages import Mode
from broker.settings import load
from tests.unit.worker_client.models import config, version_of
from worker_client.config import WorkerConfig
from worker_client.loading import load_task
from worker_client.task import Shard
from worker_client.tasks.text import ALPHABET, LargeText, Text, Transformer, generate
from worker_client.training import Trainer, build_model, initial_parameters

ROOT = Path(__file__).resolve().parents[2]
SMALL = {"width": 32, "layers": 1, "heads": 2, "length": 32}


def text_of(examples: torch.Tensor) -> str:
    return "".join(ALPHABET[code] for code in examples.flatten().tolist())


def small() -> Transformer:
    model = build_model(Text(**SMALL))
    assert isinstance(model, Transformer)
    return model.eval()


@pytest.mark.parametrize("count", [1, 4, 10])
def test_the_shards_are_of_one_size_and_no_paragraph_is_in_two_or_held_out(count: int) -> None:
    # Given
    task = Text()
    shards = [task.data(Shard(f"w{n}", n, count)).tensors[0] for n in range(count)]
    texts = [text_of(shard) for shard in [*shards, task.test_data().tensors[0]]]

    # Then
    sizes = [len(text) for text in texts[:-1]]
    assert sum(sizes) > 250_000
    assert len(texts[-1]) > 20_000
    assert max(sizes) < 1.25 * min(sizes)
    paragraphs = [{" ".join(part.split()) for part in text.split("\n\n")[1:-1]} for text in texts]
    assert len(set.union(*paragraphs)) == sum(map(len, paragraphs))


def test_targets_are_the_next_characters() -> None:
    inputs, targets = Text().data(Shard("w", 0, 2)).tensors

    assert inputs.shape == targets.shape
    assert inputs.dtype == targets.dtype == torch.int64
    assert torch.equal(inputs.flatten()[1:], targets.flatten()[:-1])


def test_the_cut_is_the_same_in_another_process() -> None:
    # Python's hashes of strings differ from process to process.
    code = (
        "from worker_client.tasks.text import Text; from worker_client.task import Shard; "
        "print(Text().data(Shard('w', 1, 3)).tensors[0].flatten().tolist()[:5000])"
    )
    environment = {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )

    assert done.stdout.strip() == str(Text().data(Shard("w", 1, 3)).tensors[0].flatten().tolist()[:5000])


def test_no_character_sees_the_next_one() -> None:
    model = small()
    codes = torch.arange(20)[None]
    changed = codes.clone()
    changed[0, 12] = 90

    with torch.no_grad():
        one, other = model(codes)[0], model(changed)[0]

    torch.testing.assert_close(one[:12], other[:12])
    assert not torch.allclose(one[12:], other[12:])


def test_the_sizes_are_what_the_page_says() -> None:
    sizes = [sum(p.numel() for p in build_model(task).parameters()) for task in (Text(), LargeText())]

    assert [round(size / 1e6, 1) for size in sizes] == [0.9, 5.1]
    assert initial_parameters(LargeText())[0].nbytes == pytest.approx(20e6, rel=0.02)


@pytest.mark.parametrize("wrong", [{"width": 30, "heads": 4}, {"layers": 0}, {"length": 0}])
def test_sizes_that_cannot_be_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(TaskError, match="a multiple of heads"):
        Text(**wrong)


def test_more_shards_than_text_are_refused() -> None:
    with pytest.raises(TaskError, match=r"0 characters are too few .*: take fewer shards"):
        Text().data(Shard("w", 999, 1000))


def test_perplexity_falls_and_is_e_to_the_mean_loss() -> None:
    # Given
    task = Text(**SMALL)
    trainer = Trainer(task, config(local_steps=60, batch_size=8, optimizer="adamw", learning_rate=0.01))
    spec, start = initial_parameters(task)

    # When
    delta = trainer.train(version_of(spec, start, mode=Mode.DELTA)).tensors
    before = trainer.evaluate(version_of(spec, start)).metrics
    after = trainer.evaluate(version_of(spec, {n: a + delta[n] for n, a in start.items()}, 1)).metrics

    # Then
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]))
    assert before["perplexity"] > 90
    assert after["perplexity"] < 25


def test_a_prompt_is_continued_beyond_the_length_of_an_example() -> None:
    model = small().train()

    text = generate(model, "The “for” statement", length=50, seed=3)

    assert text.startswith("The “for” statement")
    assert len(text) == len("The “for” statement") + 50
    assert set(text[-50:]) <= set(ALPHABET)
    assert text == generate(model, "The “for” statement", length=50, seed=3)
    assert text != generate(model, "The “for” statement", length=50, seed=4)
    assert model.training


@pytest.mark.parametrize(("prompt", "temperature"), [("", 1.0), ("x", 0.0)])
def test_nothing_is_drawn_from_nothing(prompt: str, temperature: float) -> None:
    with pytest.raises(TaskError, match="generate"):
        generate(small(), prompt, temperature=temperature)


def test_the_examples_settings_are_settings_and_name_the_task() -> None:
    file = ROOT / "examples" / "text.toml"

    read = load({"aggregator": AggregatorConfig, "worker": WorkerConfig}, file=file, environment={})

    assert set(tomllib.loads(file.read_text())) == {"aggregator", "worker"}
    assert isinstance(load_task(read.table("worker", WorkerConfig).task), Text)
