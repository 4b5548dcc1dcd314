"""Lossy compression of tensors: pure functions on arrays, one file a codec, one table.

Which one for what, with figures and sources: ``docs/compression.md``. What each one writes stands at the top of its
file; golden bytes are in ``tests/golden/codecs``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache

from broker.codecs.base import MIN_ELEMENTS, PIECE, Codec, applies, decoded
from broker.codecs.bf16 import Bf16
from broker.codecs.eden import Eden
from broker.codecs.fp16 import Fp16
from broker.codecs.int8 import Int8
from broker.codecs.topk import TopK
from broker.errors import ConfigError
from broker.parts import Parts, made, names_of

__all__ = ["CODECS", "MIN_ELEMENTS", "PIECE", "Codec", "applies", "codec_of", "decoded"]

#: Name, and what makes the codec from the text after the colon, which may be empty.
CODECS: Parts[Callable[[str], Codec]] = Parts(
    "codec",
    "fedmq.codecs",
    {
        "bf16": Bf16.of,
        "eden": Eden.of,
        "fp16": Fp16.of,
        "int8": Int8.of,
        "topk": TopK.of,
    },
)

#: What a plan may name.
NAME = re.compile(r"[a-z0-9]{1,16}(:[0-9.]{1,16})?")


@lru_cache(maxsize=64)
def codec_of(text: str) -> Codec:
    """The codec that ``text`` names, like ``int8``, ``eden:4`` or ``topk:0.01``, or one of an installed package.

    ``text`` may be from a message: nothing is imported but what an installed package has under this name.

    Raises:
        ConfigError: there is none; says which there are.
    """
    name, colon, argument = text.partition(":")
    if name not in names_of(CODECS) or (colon and not argument):
        others = "".join(f", {other}" for other in names_of(CODECS) if other not in CODECS.own)
        raise ConfigError(
            f"no codec is called {text[:80]!r}; there are bf16, fp16, int8, eden:1 to eden:4, topk:FRACTION{others}"
        )
    codec = made(CODECS, name, argument)
    if not NAME.fullmatch(codec.name):
        raise ConfigError(
            f"codec {name!r} calls itself {codec.name!r}, which cannot travel: it is like abc, or abc:0.5"
        )
    return codec
