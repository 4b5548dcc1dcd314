"""topk: the largest, exactly as many as the layout says."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from broker.codecs import codec_of, decoded
from broker.codecs.topk import SEGMENT, TopK
from broker.errors import WireError
from broker.messages import Array
from tests.support.vectors import vector, vectors


@given(values=vectors(), fraction=st.sampled_from([1e-9, 0.01, 0.3, 0.999, 1.0]))
def test_the_largest_are_kept_the_first_of_equals_and_the_rest_is_zero(values: Array, fraction: float) -> None:
    codec = TopK(fraction)
    count = min(values.size, max(1, ceil(values.size * fraction)))
    kept = np.sort(np.argsort(-np.abs(values), kind="stable")[:count])

    planes = codec.encode(values, 0)
    result = decoded(codec, planes, values.size, 0)

    assert planes[1].view(np.uint16).tolist() == kept.tolist()
    exact = values.astype(np.float64)
    assert (np.abs(result - exact)[kept] <= np.maximum(np.abs(exact[kept]) * 2.0**-8, 2.0**-134)).all()
    assert not np.delete(result, kept).any()


def test_the_largest_of_several_segments_are_found_wherever_they_are() -> None:
    values = vector("t(3)", 3 * SEGMENT + 10)
    values[SEGMENT : 2 * SEGMENT] = 0
    values[[SEGMENT - 1, 2 * SEGMENT, 3 * SEGMENT + 9]] = [1e6, -2e6, 3e6]
    codec = TopK(1e-4)

    counts, indices, kept = codec.encode(values, 0)

    largest = np.sort(np.argsort(-np.abs(values), kind="stable")[: kept.size])
    assert counts.tolist() == np.bincount(largest // SEGMENT, minlength=4).tolist()
    assert indices.view(np.uint16).tolist() == (largest % SEGMENT).tolist()
    result = decoded(codec, (counts, indices, kept), values.size, 0)
    assert np.flatnonzero(result).tolist() == largest.tolist()


def test_all_equal_gives_the_first() -> None:
    values = np.full(2 * SEGMENT, -2.0, np.float32)
    codec = TopK(0.75)

    result = decoded(codec, codec.encode(values, 0), values.size, 0)

    assert np.flatnonzero(result).tolist() == list(range(SEGMENT * 3 // 2))


def test_what_is_left_out_and_fed_back_arrives_in_the_end() -> None:
    """Error feedback: the sum of what was decoded follows the sum of what was meant."""
    codec = TopK(0.05)
    gradient = vector("normal", 2000)
    residual, arrived = np.zeros_like(gradient), np.zeros_like(gradient)
    for _ in range(200):
        meant = gradient + residual
        sent = decoded(codec, codec.encode(meant, 0), meant.size, 0)
        residual = meant - sent
        arrived += sent

    # Without feedback the 95 % that are left out each time would be missing: a relative error of about 0.9.
    assert np.linalg.norm(arrived / 200 - gradient) < 0.2 * np.linalg.norm(gradient)


def planes_of(counts: list[int], indices: list[int]) -> tuple[Array, Array, Array]:
    """Planes for two segments, of which the second has 100 values."""
    return (
        np.array(counts, "<i4"),
        np.array(indices, np.uint16).view("<i2"),
        codec_of("bf16").encode(np.ones(len(indices), np.float32), 0)[0],
    )


SIZE = SEGMENT + 100
THREE = TopK(3 / SIZE)


def test_planes_by_hand_are_decoded() -> None:
    result = decoded(THREE, planes_of([2, 1], [0, SEGMENT - 1, 99]), SIZE, 0)

    assert np.flatnonzero(result).tolist() == [0, SEGMENT - 1, SIZE - 1]


@pytest.mark.parametrize(
    ("counts", "indices", "message"),
    [
        ([2, 1], [5, 5, 0], "do not rise"),
        ([2, 1], [6, 5, 0], "do not rise"),
        ([2, 1], [5, 6, 100], "do not rise"),
        ([1, 2], [5, 6, 65535], "do not rise"),
        ([0, 3], [2, 1, 0], "do not rise"),
        ([2, 0], [5, 6, 7], "there are 3"),
        ([2, 2], [5, 6, 7], "there are 3"),
        ([4, -1], [5, 6, 7], "has -1 values"),
        ([2**31 - 1, 2**31 - 1], [5, 6, 7], "there are 3"),
    ],
)
def test_planes_that_no_encoder_gives_are_refused(counts: list[int], indices: list[int], message: str) -> None:
    with pytest.raises(WireError, match=message):
        THREE.pieces(planes_of(counts, indices), SIZE, 0)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    planes = planes_of([2, 1], [0, 1, 2])
    planes[2][1] = value

    with pytest.raises(WireError, match="not finite"):
        THREE.pieces(planes, SIZE, 0)
