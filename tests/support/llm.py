"""Language models of the real classes, small and random: nothing is downloaded."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

__all__ = ["SENTENCES", "make_base", "require_llm"]

SENTENCES = (
    "the worker trains on data that never leaves it",
    "the aggregator makes a version durable and broadcasts it",
    "an update counts once however often it comes",
    "a model is averaged in rounds and nobody waits for a slow worker",
)


def require_llm() -> None:
    """Skip the test where transformers and PEFT are not installed; in CI that is a failure."""
    missing = [name for name in ("transformers", "peft") if find_spec(name) is None]
    if missing and os.environ.get("CI"):
        pytest.fail(f"CI needs {' and '.join(missing)}")
    if missing:
        pytest.skip(f"{' and '.join(missing)} not installed: pip install 'fedmq[llm]'")


def make_base(folder: Path, kind: str = "llama", dtype: torch.dtype = torch.float32) -> Path:
    """A model and its tokenizer in ``folder``, as ``save_pretrained`` leaves them."""
    import tokenizers  # noqa: PLC0415 - optional dependencies
    import transformers  # noqa: PLC0415

    words = tokenizers.Tokenizer(tokenizers.models.BPE())
    words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    words.train_from_iterator(SENTENCES, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")  # noqa: S106 (a token of text)
    tokenizer.save_pretrained(str(folder))
    model: Any
    with torch.random.fork_rng():
        torch.manual_seed(7)
        if kind == "gpt2":
            config = transformers.GPT2Config(
                vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
            )
            model = transformers.GPT2LMHeadModel(config)
        else:
            config = transformers.LlamaConfig(
                vocab_size=300,
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
                # Ten times the usual: a frozen output layer of small numbers could not say anything.
                initializer_range=0.2,
                bos_token_id=0,
                eos_token_id=0,
            )
            model = transformers.LlamaForCausalLM(config)
    model.to(dtype).save_pretrained(str(folder))
    return folder
