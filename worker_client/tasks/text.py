"""English text, character by character: a small causal transformer on Python's own reference manual.

The manual's topics come with every Python (``pydoc_data.topics``, what ``help("for")`` shows), so nothing is
downloaded. A shard is whole topics, as sites write about different things; every tenth topic is held out. The metric
is perplexity: the number of equally likely characters among which the choice would be as hard.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from broker.errors import TaskError
from worker_client.task import Shard
from worker_client.tasks.language import Language

__all__ = ["ALPHABET", "LargeText", "Text", "Transformer", "generate"]

#: Printable ASCII, and the last one for all the rest. Not taken from the text, which changes from one release of
#: Python to the next: all workers of a run need the same model.
ALPHABET = "\n" + "".join(map(chr, range(32, 127))) + "\N{REPLACEMENT CHARACTER}"

HELD_OUT = 10
#: How a paragraph begins that is a table drawn with dashes: no English.
TABLE = ("+-", "|")
#: How many characters, itself included, a character's representation is made from.
NEIGHBOURS = 4


class Text(Language):
    """Say which character comes next.

    Args:
        width: numbers in a character's representation; a multiple of ``heads``.
        layers: of the transformer; the parameters are about ``12 * layers * width ** 2``.
        heads: of each layer's attention.
        length: characters in an example, and the most that the model looks back on.

    Raises:
        TaskError: one of them is less than 1, or ``width`` is no multiple of ``heads``.
    """

    def __init__(self, *, width: int = 128, layers: int = 4, heads: int = 4, length: int = 128) -> None:
        if min(width, layers, heads, length) < 1 or width % heads:
            raise TaskError(
                f"Text(width={width}, layers={layers}, heads={heads}, length={length}): "
                "each is at least 1, and width a multiple of heads"
            )
        self.width, self.layers, self.heads, self.length = width, layers, heads, length

    def model(self) -> Transformer:
        """A new transformer: 0.9 million parameters by default."""
        return Transformer(width=self.width, layers=self.layers, heads=self.heads, length=self.length)

    def data(self, shard: Shard) -> TensorDataset:
        """Inputs and targets of shape (``length``,), int64; the targets are the inputs, one character further on.

        Raises :class:`TaskError` if the shard's topics are shorter than one example.
        """
        topics = [text for number, text in enumerate(_topics()) if number % HELD_OUT]
        return self._examples(_dealt(topics, shard.count)[shard.index])

    def test_data(self) -> TensorDataset:
        """The held-out topics, in the same form."""
        return self._examples("".join(_topics()[::HELD_OUT]))

    def loss(self, model: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        """Mean cross entropy, in nats a character."""
        inputs, targets = batch
        return functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())

    def _examples(self, text: str) -> TensorDataset:
        codes = _encoded(text)
        count = (len(codes) - 1) // self.length
        if count < 1:
            raise TaskError(
                f"{len(codes)} characters are too few for an example of {self.length}: take fewer shards, or shorter "
                "examples"
            )
        end = count * self.length
        return TensorDataset(codes[:end].view(count, -1), codes[1 : end + 1].view(count, -1))


class LargeText(Text):
    """The same with 5 million parameters, so that an update has 20 MB."""

    def __init__(self) -> None:
        super().__init__(width=256, layers=6, heads=8)


class Transformer(nn.Module):
    """A causal transformer with pre-norm layers and tied embeddings, as GPT-2 (Radford et al. 2019).

    Two differences, both to learn something within minutes. Weights are drawn with a standard deviation of one over
    the square root of their inputs: GPT-2's 0.02 fits wide models and is far too little for a narrow one. And a causal
    convolution gives each character its three predecessors, which attention takes hundreds of steps to find (as Primer
    does for queries, keys and values: So et al. 2021, arXiv 2109.08668).
    """

    def __init__(self, *, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.length = length
        self.symbols = nn.Embedding(len(ALPHABET), width)
        self.places = nn.Embedding(length, width)
        self.neighbours = nn.Conv1d(width, width, NEIGHBOURS)
        stack = [_Layer(width, heads) for _ in range(layers)]
        self.layers = nn.Sequential(*stack)
        self.norm = nn.LayerNorm(width)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear | nn.Conv1d):
                nn.init.normal_(module.weight, std=module.weight[0].numel() ** -0.5)
            if isinstance(module, nn.Linear | nn.Conv1d) and module.bias is not None:
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.places.weight, std=0.02)
        with torch.no_grad():
            for layer in stack:
                # What 2 * layers branches add up to should not grow with their number.
                for branch in (layer.mix, layer.contract):
                    branch.weight.div_((2 * layers) ** 0.5)

    def forward(self, codes: Tensor) -> Tensor:
        """Logits of the next character, (batch, length, alphabet), for ``codes``, int64, (batch, length)."""
        symbols = self.symbols(codes)
        padded = functional.pad(symbols.transpose(1, 2), (NEIGHBOURS - 1, 0))
        places = self.places(torch.arange(codes.shape[1], device=codes.device))
        states = self.layers(symbols + self.neighbours(padded).transpose(1, 2) + places)
        return functional.linear(self.norm(states), self.symbols.weight)


class _Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention = nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.before_expand = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.contract = nn.Linear(4 * width, width)

    def forward(self, states: Tensor) -> Tensor:
        batch, length, width = states.shape
        parts = self.attention(self.before_attention(states)).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = parts.permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        states = states + self.mix(seen.transpose(1, 2).reshape(batch, length, width))
        fed: Tensor = self.contract(functional.gelu(self.expand(self.before_expand(states))))
        return states + fed


def generate(
    model: Transformer, prompt: str = "\n", *, length: int = 300, temperature: float = 0.7, seed: int = 0
) -> str:
    """``prompt`` and ``length`` more characters that ``model`` draws, one after the other.

    Args:
        model: as ``fedmq.load_model(Text(), file)`` gives it; on any device.
        prompt: at least one character.
        length: characters to draw.
        temperature: more than 0; the smaller, the surer and the more monotonous.
        seed: the same one gives the same text on the same machine.

    Raises:
        TaskError: ``prompt`` is empty or ``temperature`` not more than 0.
    """
    if not prompt or temperature <= 0:
        raise TaskError("generate: the prompt needs a character, and the temperature is more than 0")
    random = torch.Generator().manual_seed(seed)
    codes = _encoded(prompt)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        for _ in range(length):
            seen = codes[-model.length :].to(model.symbols.weight.device)
            logits = model(seen[None])[0, -1].float().cpu()
            code = torch.multinomial(torch.softmax(logits / temperature, 0), 1, generator=random)
            codes = torch.cat([codes, code])
    model.train(was_training)
    return prompt + "".join(ALPHABET[code] for code in codes[len(prompt) :].tolist())


def _encoded(text: str) -> Tensor:
    known = {character: code for code, character in enumerate(ALPHABET)}
    return torch.tensor([known.get(character, len(ALPHABET) - 1) for character in text], dtype=torch.int64)


def _dealt(topics: Sequence[str], count: int) -> list[str]:
    """``topics`` in ``count`` parts of about one size: the largest first, each to the smallest part."""
    parts: list[list[str]] = [[] for _ in range(count)]
    sizes = [0] * count
    for text in sorted(topics, key=len, reverse=True):
        smallest = sizes.index(min(sizes))
        parts[smallest].append(text)
        sizes[smallest] += len(text)
    return ["".join(part) for part in parts]


@cache
def _topics() -> tuple[str, ...]:
    """The manual's topics by name, without tables, and without any paragraph that stands in another one, too.

    Whole chapters stand in several topics ("with" is in "compound"): what is held out would be known, and shards
    would not be disjoint. A paragraph stays in the smallest of its topics.
    """
    try:
        from pydoc_data.topics import topics  # noqa: PLC0415 - some distributions leave it out
    except ImportError:
        raise TaskError(
            "this Python comes without the text of its manual (pydoc_data.topics); Debian and Ubuntu have it in "
            "libpython3-stdlib"
        ) from None
    kept: dict[str, str] = {}
    seen: set[str] = set()
    for name in sorted(topics, key=lambda name: (len(topics[name]), name)):
        kept[name] = ""
        for paragraph in re.split(r"\n{2,}", topics[name].strip("\n")):
            # Where a paragraph stands decides how far it is indented.
            words = " ".join(paragraph.split())
            if words not in seen and not words.startswith(TABLE):
                seen.add(words)
                kept[name] += f"{paragraph}\n\n"
    return tuple(kept[name] for name in sorted(kept))
