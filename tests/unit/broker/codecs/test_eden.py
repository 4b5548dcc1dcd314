"""eden: the levels, the rotation, and that what comes out is right in the mean."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from math import erf, exp, inf, pi, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.codecs import codec_of, decoded
from broker.codecs.eden import BLOCK, LARGEST_SCALE, LEVELS
from broker.codecs.hadamard import flip_signs, transform
from broker.errors import WireError
from broker.messages import Array
from tests.support.vectors import DENSE, vector, vectors, vnmse

BITS = (1, 2, 3, 4)
#: D / (1 - D) with the distortion D of the best quantiser of N(0, 1) with as many bits (Max 1960, table I).
THEORY = {1: 0.5708, 2: 0.1331, 3: 0.03578, 4: 0.00959}


def through(bits: int, values: Array, seed: int) -> Array:
    codec = codec_of(f"eden:{bits}")
    return decoded(codec, codec.encode(values, seed), values.size, seed)


def density(x: float) -> float:
    return exp(-x * x / 2) / sqrt(2 * pi)


def share(low: float, high: float) -> float:
    return (erf(high / sqrt(2)) - erf(low / sqrt(2))) / 2


def cells(levels: list[float]) -> Iterator[tuple[float, float]]:
    return pairwise([0.0, *((a + b) / 2 for a, b in pairwise(levels)), inf])


@pytest.mark.parametrize("bits", BITS)
def test_each_level_is_the_mean_of_its_cell_and_each_border_the_middle_between_levels(bits: int) -> None:
    """Lloyd's iteration: it converges to the only optimum, since the normal density is log-concave (Fleischer 1964)."""
    levels = [0.3 * (i + 1) for i in range(2 ** (bits - 1))]
    for _ in range(2000):
        levels = [(density(low) - density(high)) / share(low, high) for low, high in cells(levels)]

    np.testing.assert_allclose(LEVELS[bits], levels, rtol=1e-6)
    # E q^2 = E xq for centroids, so the distortion is 1 - E q^2.
    distortion = 1 - 2 * sum(q * q * share(*cell) for q, cell in zip(levels, cells(levels), strict=True))
    assert distortion / (1 - distortion) == pytest.approx(THEORY[bits], rel=2e-3)


@pytest.mark.parametrize("shape", DENSE)
@pytest.mark.parametrize("bits", BITS)
def test_the_error_is_that_of_theory_whatever_the_values_are(bits: int, shape: str) -> None:
    errors = []
    for seed in range(3):
        values = vector(shape, 4 * BLOCK, seed=seed)
        errors.append(vnmse(values, through(bits, values, seed)))

    assert np.mean(errors) == pytest.approx(THEORY[bits], rel=0.02)


@pytest.mark.parametrize("shape", DENSE)
@pytest.mark.parametrize("bits", BITS)
def test_the_errors_of_different_seeds_average_out(bits: int, shape: str) -> None:
    values = vector(shape, 2 * BLOCK)

    mean = np.asarray(np.mean([through(bits, values, seed) for seed in range(10)], axis=0, dtype=np.float64))

    assert vnmse(values, mean) == pytest.approx(THEORY[bits] / 10, rel=0.1)


@pytest.mark.parametrize("size", [1025, 5000, 100_003])
@pytest.mark.parametrize("bits", BITS)
def test_sizes_that_are_no_power_of_two_are_as_good_and_take_no_more_bytes(bits: int, size: int) -> None:
    errors = []
    for seed in range(20):
        values = vector("normal", size, seed=seed)
        errors.append(vnmse(values, through(bits, values, seed)))

    assert np.mean(errors) == pytest.approx(THEORY[bits], rel=0.04)
    planes = codec_of(f"eden:{bits}").encode(values, 0)
    assert sum(plane.nbytes for plane in planes) <= size * bits / 8 + 128 * bits / 8 + 4 * (size // BLOCK + 10)


@pytest.mark.parametrize("bits", BITS)
@given(values=vectors(), seed=st.integers(0, 2**53))
def test_the_scale_makes_the_projection_on_the_values_exact(bits: int, values: Array, seed: int) -> None:
    """<decoded, x> = ||x||^2 (equation 4 of the paper), which with the symmetry of the signs makes it unbiased."""
    exact = values.astype(np.float64)
    largest = np.abs(exact).max(initial=0)
    if not 1e-30 < largest < 1e33:
        return

    result = through(bits, values, seed).astype(np.float64)

    assert np.dot(result / largest, exact / largest) == pytest.approx(np.square(exact / largest).sum(), rel=1e-4)


@pytest.mark.parametrize("bits", BITS)
def test_the_smallest_and_the_largest_numbers_neither_vanish_nor_overflow(bits: int) -> None:
    for exponent in (-120, 100):
        values = vector("normal", 3000, exponent=exponent)
        assert vnmse(values, through(bits, values, 1)) < 2 * THEORY[bits]
    denormal = vector("normal", 3000, exponent=-140)
    assert np.abs(through(bits, denormal, 1)).max() < 2.0**-130
    largest = np.full(3000, np.finfo(np.float32).max)
    assert np.isfinite(through(bits, largest, 1)).all()


@pytest.mark.parametrize("scale", [np.nan, np.inf, -np.inf, -1e-9, 2 * LARGEST_SCALE])
def test_scales_that_no_encoder_gives_are_refused(scale: float) -> None:
    scales, codes = codec_of("eden:2").encode(vector("normal", 3000), 0)
    scales[-1] = scale

    with pytest.raises(WireError, match="eden:2: scales from"):
        codec_of("eden:2").pieces((scales, codes), 3000, 0)


def test_another_seed_decodes_to_something_else() -> None:
    codec = codec_of("eden:4")
    values = vector("normal", 3000)
    planes = codec.encode(values, 1)

    assert vnmse(values, decoded(codec, planes, values.size, 1)) < 0.02
    assert vnmse(values, decoded(codec, planes, values.size, 2)) > 1.0


# ------------------------------------------------------------------------------------------------- rotation


@pytest.mark.parametrize("size", [1, 2, 4, 8, 128, 256, 512, 1024])
def test_the_transform_is_the_product_with_sylvesters_matrix(size: int) -> None:
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    values = np.random.default_rng(size).integers(-1000, 1000, size).astype(np.float32)

    result, _ = transform(values.copy(), np.empty_like(values))

    # Whole numbers this small are exact in float32.
    assert result.tolist() == (matrix @ values).tolist()


def test_the_sums_of_the_transform_are_in_the_order_that_stands_there() -> None:
    values = vector("log-normal", 256)
    expected = values.copy()
    half = 128
    while half:
        for p in range(256):
            if not p & half:
                u, v = expected[p], expected[p + half]
                expected[p], expected[p + half] = u + v, u - v
        half //= 2

    result, _ = transform(values, np.empty_like(values))

    assert result.tobytes() == expected.tobytes()


def splitmix(state: int) -> int:
    z = state % 2**64
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return z ^ z >> 31


@pytest.mark.parametrize("seed", [0, 1, 2**53])
def test_signs_are_bits_of_a_counter(seed: int) -> None:
    values = np.ones(256, np.float32)
    flip_signs(values, seed, 128)

    for i, value in enumerate(values):
        word = splitmix(splitmix(seed) + ((128 + i) // 64 + 1) * 0x9E3779B97F4A7C15)
        assert value == (-1 if word >> i % 64 & 1 else 1)


def test_signs_are_even_and_independent_of_seed_and_place() -> None:
    streams = []
    for seed in range(8):
        for start in (0, 2**16):
            stream = np.ones(2**16, np.float32)
            flip_signs(stream, seed, start)
            streams.append(stream)
    correlation = np.corrcoef(streams)

    # Five standard deviations of 2**-8.
    assert np.abs(np.mean(streams, axis=1)).max() < 5 / 256
    assert np.abs(correlation - np.eye(16)).max() < 5 / 256
