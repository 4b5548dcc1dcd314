"""Inputs for codecs."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from hypothesis import strategies as st

from broker.codecs import Codec, codec_of
from broker.messages import Array

#: One of each kind, and what is special about its arguments.
NAMES = ("bf16", "fp16", "int8", "eden:1", "eden:2", "eden:3", "eden:4", "topk:0.01", "topk:0.3", "topk:1.0")
CODECS: tuple[Codec, ...] = tuple(map(codec_of, NAMES))

#: Around the blocks' borders, and none.
SIZES = (0, 1, 2, 127, 128, 129, 255, 256, 257, 1000, 1024, 2500)

Draw = Callable[[np.random.Generator, int], Array]
SHAPES: Mapping[str, Draw] = {
    "normal": lambda random, size: random.standard_normal(size),
    "log-normal": lambda random, size: random.lognormal(size=size),
    "t(3)": lambda random, size: random.standard_t(3, size),
    "constant": lambda _random, size: np.ones(size),
    "zero": lambda _random, size: np.zeros(size),
    "one of many": lambda random, size: np.arange(size) == random.integers(max(size, 1)),
    "few different": lambda random, size: random.integers(-2, 3, size),
}
DENSE = ("normal", "log-normal", "t(3)")


def vector(shape: str, size: int, *, seed: int = 0, exponent: int = 0) -> Array:
    """``size`` float32 values times 2**exponent, clipped to what is finite."""
    values = np.ldexp(SHAPES[shape](np.random.default_rng(seed), size).astype(np.float64), exponent)
    largest = np.finfo(np.float32).max
    return np.asarray(np.clip(values, -largest, largest).astype(np.float32))


def vectors() -> st.SearchStrategy[Array]:
    """Of all shapes and sizes, from denormal to huge."""
    return st.builds(
        vector,
        st.sampled_from(sorted(SHAPES)),
        st.sampled_from(SIZES),
        seed=st.integers(0, 2**32),
        exponent=st.integers(-160, 130),
    )


def vnmse(values: Array, result: Array) -> float:
    """The square of the error in relation to that of ``values``."""
    exact = values.astype(np.float64)
    return float(np.square(result - exact).sum() / np.square(exact).sum())
