"""Large language models by their adapters: Hugging Face transformers and PEFT's LoRA.

Needs ``pip install "fedmq[llm]"``. The base model stays where it is, frozen; only the adapters train, and so only they
travel. LoRA (Hu et al. 2021, arXiv 2106.09685) adds ``alpha / rank * B A`` to a weight matrix, with B (outputs, rank)
and A (rank, inputs).

The mean of the workers' adapters is not the adapter of the mean: mean(B) mean(A) != mean(B A). So by default A stays as
it was drawn and only B trains (FFA-LoRA: Sun et al. 2024, arXiv 2403.12313): mean(B) A = mean(B A), exactly, and the
same for stale updates, since a change of B means the same change of the weights at every version.
"""

from __future__ import annotations

import json
import math
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from broker.errors import TaskError
from worker_client.task import Shard
from worker_client.tasks.language import Language
from worker_client.training import load_model

__all__ = ["Lora", "export_adapter"]

JSON_LINES = (".jsonl", ".ndjson")


class Lora(Language):
    """Go on training a causal language model on the worker's own text, by LoRA adapters.

    Args:
        base: the model and its tokenizer: a local folder, or a name on the hub. Weights are read from safetensors only,
            and no code is taken from there.
        files: the worker's text: a path or several, with ``*`` and ``**``; ``{worker}``, ``{index}`` and ``{count}``
            stand for the shard's. In ``*.jsonl`` each line is an object whose ``text`` is a document; every other file
            is one document.
        test_files: held-out text for evaluators, in the same form, where only ``*`` and ``**`` stand for something.
        revision: branch, tag or commit on the hub. Name a commit: all workers need the same base.
        rank: r; columns of B and rows of A.
        alpha: the adapters are multiplied by ``alpha / rank``.
        targets: ends of the names of the modules that get an adapter, or ``"all-linear"``; if None, what PEFT takes for
            this kind of model, the queries and values of attention as a rule.
        dropout: before the adapters, in training.
        freeze_a: train B only. With False both train, twice the numbers travel, and their mean is an approximation.
        length: tokens in an example.
        dtype: of the base, ``"auto"`` is what it was saved in. The adapters are float32, and computed in it.
        gradient_checkpointing: compute activations a second time instead of keeping them: less memory, a third slower.
    """

    def __init__(
        self,
        base: str | Path,
        files: str | Sequence[str],
        *,
        test_files: str | Sequence[str] = (),
        revision: str = "main",
        rank: int = 8,
        alpha: float = 16.0,
        targets: str | Sequence[str] | None = None,
        dropout: float = 0.0,
        freeze_a: bool = True,
        length: int = 512,
        dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
        gradient_checkpointing: bool = False,
    ) -> None:
        if rank < 1 or length < 2 or not 0 <= dropout < 1:
            raise TaskError("Lora: rank is at least 1, length at least 2, and dropout from 0 to less than 1")
        self.base = str(base)
        self.files = _several(files)
        self.test_files = _several(test_files)
        self.revision = revision
        self.rank, self.alpha, self.dropout, self.freeze_a = rank, alpha, dropout, freeze_a
        self.targets = targets if targets is None or isinstance(targets, str) else list(targets)
        self.length = length
        self.dtype = dtype
        self.gradient_checkpointing = gradient_checkpointing

    def model(self) -> nn.Module:
        """The base in a ``PeftModel``, with fresh adapters: A drawn from ``seed``, B zero.

        Raises :class:`TaskError` if the base cannot be loaded, or has none of the ``targets``.
        """
        peft = _library("peft")
        base = self._loaded("AutoModelForCausalLM", dtype=self.dtype, use_safetensors=True)
        base.config.use_cache = False
        if self.gradient_checkpointing:
            base.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        config = peft.LoraConfig(
            task_type="CAUSAL_LM",
            r=self.rank,
            lora_alpha=self.alpha,
            target_modules=self.targets,
            lora_dropout=self.dropout,
            # GPT-2 keeps its weights the other way round.
            fan_in_fan_out=any(type(module).__name__ == "Conv1D" for module in base.modules()),
        )
        with _translated(f"Lora: no adapters for {self.base!r} with targets {self.targets}"):
            model: nn.Module = peft.get_peft_model(base, config)
        _draw_a(model, seed=self.seed, frozen=self.freeze_a)
        return model

    def data(self, shard: Shard) -> TensorDataset:
        """The worker's text in blocks of ``length`` tokens, int32; documents follow each other, each with its end.

        A block may begin in mid-document and hold several; what is left over at the end is not used.

        Raises :class:`TaskError` if a file is missing or cannot be read, or if there is less than one block.
        """
        facts = {"{worker}": shard.worker, "{index}": str(shard.index), "{count}": str(shard.count)}
        return self._blocks([_filled(pattern, facts) for pattern in self.files])

    def test_data(self) -> TensorDataset | None:
        """The held-out text in the same form. Raises as :meth:`data`."""
        return self._blocks(self.test_files) if self.test_files else None

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Mean cross entropy in nats a token, of all tokens of a block but its first; in float32."""
        codes = batch[0].long()
        logits = model(input_ids=codes).logits[:, :-1]
        return functional.cross_entropy(logits.flatten(0, 1).float(), codes[:, 1:].flatten())

    def _blocks(self, patterns: Sequence[str]) -> TensorDataset:
        tokens = array("i")
        end = self._tokenizer.eos_token_id
        for text in _documents(patterns):
            tokens.extend(self._tokenizer.encode(text, add_special_tokens=False, verbose=False))
            if end is not None:
                tokens.append(end)
        count = len(tokens) // self.length
        if count < 1:
            shown = ", ".join(patterns)
            raise TaskError(
                f"{shown}: {len(tokens)} tokens are less than one block: a smaller length (is {self.length})"
            )
        blocks = np.frombuffer(tokens, dtype=np.intc)[: count * self.length].reshape(count, self.length)
        return TensorDataset(torch.from_numpy(blocks.copy()))

    @cached_property
    def _tokenizer(self) -> Any:
        return self._loaded("AutoTokenizer")

    def _loaded(self, kind: str, **options: Any) -> Any:
        loader = getattr(_library("transformers"), kind)
        with _translated(f"Lora: base = {self.base!r} (a local folder, or a name on the hub) cannot be loaded"):
            return loader.from_pretrained(self.base, revision=self.revision, trust_remote_code=False, **options)


def export_adapter(task: Lora, file: Path | str, folder: Path | str) -> None:
    """Write the run's adapters as PEFT keeps them: ``PeftModel.from_pretrained(base, folder)`` loads them.

    Args:
        task: the run's.
        file: the run's ``model.safetensors``, or what ``fedmq checkpoint export`` wrote.
        folder: where ``adapter_config.json`` and ``adapter_model.safetensors`` go.

    Raises:
        TaskError: the base cannot be loaded, ``file`` not read or ``folder`` not written.
        ModelMismatch: ``file`` holds the adapters of another task.
    """
    model: Any = load_model(task, file)
    with _translated(f"{folder} cannot be written"):
        # Embeddings have no adapters' business here, and PEFT would ask the hub about them.
        model.save_pretrained(str(folder), save_embedding_layers=False)


def _draw_a(model: nn.Module, *, seed: int, frozen: bool) -> None:
    """Draw each A as PEFT does, but from a generator of its own.

    A frozen A must be the same on every worker, and torch's global random numbers are everybody's: other threads', and
    those of whatever loads the base.
    """
    random = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_A." in name:
            drawn = torch.empty(parameter.shape, dtype=torch.float32)
            nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=random)
            parameter.data.copy_(drawn)
            parameter.requires_grad_(not frozen)
        elif frozen and ".lora_embedding_A." in name:
            raise TaskError(
                "Lora: of an embedding's adapter A starts at zero, and could not stay there: freeze_a=False"
            )


def _documents(patterns: Sequence[str]) -> Iterator[str]:
    for pattern in patterns:
        path = Path(pattern)
        start = Path(path.anchor)
        files = sorted(file for file in start.glob(str(path.relative_to(start))) if file.is_file())
        if not files:
            raise TaskError(f"no file is there that is called {pattern!r} (seen from {Path.cwd()})")
        for file in files:
            with _translated(f"{file} cannot be read"):
                yield from _json_lines(file) if file.suffix in JSON_LINES else [file.read_text(encoding="utf-8")]


def _json_lines(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except ValueError as error:
                raise TaskError(f"{file}:{number}: no JSON: {error}") from None
            text = found.get("text") if isinstance(found, dict) else None
            if not isinstance(text, str):
                raise TaskError(f'{file}:{number}: each line is an object with a text: {{"text": "…"}}')
            yield text


def _several(given: str | Sequence[str]) -> list[str]:
    return [given] if isinstance(given, str) else list(given)


def _filled(pattern: str, facts: dict[str, str]) -> str:
    for mark, value in facts.items():
        pattern = pattern.replace(mark, value)
    return pattern


def _library(name: Literal["peft", "transformers"]) -> Any:
    try:
        if name == "peft":
            import peft  # noqa: PLC0415 - an optional dependency, and seconds to import

            return peft
        import transformers  # noqa: PLC0415

        return transformers
    except ImportError as error:
        raise TaskError(f'language models need transformers and PEFT ({error}): pip install "fedmq[llm]"') from None


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """What the libraries and the disk raise on purpose, as :class:`TaskError`."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise TaskError(f"{what}: {error}") from error
