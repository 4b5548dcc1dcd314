"""bf16, fp16 and int8: each value by itself, or in small blocks."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given

from broker.codecs import codec_of, decoded
from broker.codecs.int8 import BLOCK
from broker.errors import WireError
from broker.messages import Array
from tests.support.vectors import DENSE, vector, vectors, vnmse

LARGEST = np.finfo(np.float32).max
TINY = np.finfo(np.float32).tiny


def through(name: str, values: Array) -> Array:
    codec = codec_of(name)
    return decoded(codec, codec.encode(values, 0), values.size, 0)


@given(values=vectors())
def test_bf16_is_off_by_half_of_its_last_bit(values: Array) -> None:
    error = np.abs(through("bf16", values).astype(np.float64) - values)

    assert (error <= np.maximum(np.abs(values.astype(np.float64)) * 2.0**-8, 2.0**-134)).all()


@given(values=vectors())
def test_fp16_is_off_by_half_of_its_last_bit_and_stops_at_the_largest(values: Array) -> None:
    inside = np.clip(values.astype(np.float64), -65504, 65504)

    error = np.abs(through("fp16", values) - inside)

    assert (error <= np.maximum(np.abs(inside) * 2.0**-11, 2.0**-25)).all()


def test_halves_round_to_even_and_never_to_infinity() -> None:
    values = np.array([1 + 2.0**-8, 1 + 3 * 2.0**-8, -1 - 2.0**-8, LARGEST, -LARGEST, -0.0], np.float32)

    largest = float(ml_dtypes.finfo(ml_dtypes.bfloat16).max)  # type: ignore[no-untyped-call]
    assert through("bf16", values).tolist() == [1, 1 + 2.0**-6, -1, largest, -largest, 0]
    assert through("fp16", np.array([1 + 2.0**-11, 65520, -1e9], np.float32)).tolist() == [1, 65504, -65504]


@pytest.mark.parametrize(("name", "bits"), [("bf16", 0x7F80), ("bf16", 0xFFC1), ("fp16", 0xFC00), ("fp16", 0x7C01)])
@pytest.mark.parametrize("place", [0, 70_000, 99_999])
def test_halves_that_are_not_finite_are_refused(name: str, bits: int, place: int) -> None:
    (plane,) = codec_of(name).encode(vector("normal", 100_000), 0)
    plane.view(np.uint16)[place] = bits

    with pytest.raises(WireError, match=f"{name}: a value is not finite"):
        codec_of(name).pieces((plane,), plane.size, 0)


@given(values=vectors())
def test_int8_is_off_by_half_a_scale(values: Array) -> None:
    result = through("int8", values)

    for start in range(0, values.size, BLOCK):
        block = values[start : start + BLOCK].astype(np.float64)
        scale = max(np.abs(block).max() / 127, TINY)
        # The scale itself, its inverse and their products are rounded.
        assert np.abs(result[start : start + BLOCK] - block).max() <= scale * (0.5 + 1e-4)


def test_int8_keeps_the_largest_of_each_block_and_whole_multiples() -> None:
    values = np.concatenate([np.arange(-127, 129) * 0.5, [3.0]]).astype(np.float32)
    values[255] = 0

    result = through("int8", values)

    np.testing.assert_allclose(result, values, rtol=1e-6)


@pytest.mark.parametrize("extreme", [LARGEST, 1e-38, 1e-44, 1e-45])
def test_int8_takes_the_extremes_of_float32(extreme: float) -> None:
    values = np.full(300, extreme, np.float32)
    values[::2] *= -1

    np.testing.assert_allclose(through("int8", values), values, rtol=1e-6, atol=float(TINY) / 2)


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1.0, -0.0, 0.0, 1e-40, 3e38])
def test_int8_refuses_scales_that_no_encoder_gives(scale: float) -> None:
    scales, codes = codec_of("int8").encode(vector("normal", 1000), 0)
    scales[2] = scale

    with pytest.raises(WireError, match="int8: scales from"):
        codec_of("int8").pieces((scales, codes), 1000, 0)


def test_int8_refuses_the_code_that_no_encoder_gives() -> None:
    scales, codes = codec_of("int8").encode(vector("normal", 1000), 0)
    codes[999] = -128

    with pytest.raises(WireError, match="-128"):
        codec_of("int8").pieces((scales, codes), 1000, 0)


@pytest.mark.parametrize(
    ("name", "bounds"),
    [
        ("bf16", (2.5e-6, 3.0e-6)),
        ("fp16", (3.5e-8, 5.0e-8)),
        ("int8", (4.5e-5, 4e-4)),
    ],
)
@pytest.mark.parametrize("shape", DENSE)
def test_errors_are_as_the_pages_say(name: str, bounds: tuple[float, float], shape: str) -> None:
    values = vector(shape, 2**18)

    assert bounds[0] < vnmse(values, through(name, values)) < bounds[1]


def test_int8_takes_hardly_more_than_a_quarter() -> None:
    planes = codec_of("int8").encode(vector("normal", 2**16), 0)

    assert sum(plane.nbytes for plane in planes) <= 0.254 * 4 * 2**16
