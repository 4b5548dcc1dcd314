"""Lossy compression of tensors: pure functions on arrays, one file a codec, one table.

Which one for what, with figures and sources: ``docs/compression.md``. What each one writes stands at the top of its
file; golden bytes are in ``tests/golden/codecs``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache

from broker.codecs.base import MIN_ELEMENTS, PIECE, Codec, applies, decoded
from broker.codecs.bf16 import Bf16
from broker.codecs.eden import Eden
from broker.codecs.fp16 import Fp16
from broker.codecs.int8 import Int8
from broker.codecs.topk import TopK
from broker.errors import ConfigError

__all__ = ["CODECS", "MIN_ELEMENTS", "PIECE", "Codec", "applies", "codec_of", "decoded"]

#: Name, and what makes the codec from the text after the colon, which may be empty.
CODECS: Mapping[str, Callable[[str], Codec]] = {
    "bf16": Bf16.of,
    "eden": Eden.of,
    "fp16": Fp16.of,
    "int8": Int8.of,
    "topk": TopK.of,
}


@lru_cache(maxsize=64)
def codec_of(text: str) -> Codec:
    """The codec that ``text`` names, like ``int8``, ``eden:4`` or ``topk:0.01``.

    Raises:
        ConfigError: there is none; says which there are.
    """
    name, colon, argument = text.partition(":")
    if name not in CODECS or (colon and not argument):
        raise ConfigError(f"no codec is called {text!r}; there are bf16, fp16, int8, eden:1 to eden:4, topk:FRACTION")
    return CODECS[name](argument)
