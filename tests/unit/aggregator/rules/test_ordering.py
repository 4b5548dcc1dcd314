"""Columns are sorted as the library sorts them."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from aggregator.strategies.rows import MemoryRows
from aggregator.strategies.rules.base import Occasion
from aggregator.strategies.rules.median import Median
from aggregator.strategies.rules.ordering import MOST, _network, sort_columns


@pytest.mark.parametrize("count", range(1, 13))
def test_a_network_sorts_whatever_there_is_to_sort(count: int) -> None:
    """What sorts all columns of zeros and ones sorts all columns (Knuth 5.3.4, theorem Z)."""
    block = np.array(list(itertools.product((0.0, 1.0), repeat=count))).T.copy()
    expected = np.sort(block, axis=0)

    sort_columns(block)

    np.testing.assert_array_equal(block, expected)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("count", [13, 16, 31, 33, MOST, MOST + 1])
@pytest.mark.parametrize("width", [0, 1, (1 << 15) + 3])
def test_any_size_is_sorted(dtype: Any, count: int, width: int) -> None:
    block = np.random.default_rng(count).standard_normal((count, width)).astype(dtype)
    expected = np.sort(block, axis=0)
    sort_columns(block)
    assert block.tobytes() == expected.tobytes()


def test_the_network_grows_slowly() -> None:
    assert [len(_network(count)) for count in (1, 2, 4, 16)] == [0, 1, 5, 63]


@given(
    st.lists(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3), min_size=1)
)
def test_the_median_is_numpys(values: list[list[float]]) -> None:
    rows = MemoryRows(3, np.dtype(np.float32))
    for row in values:
        rows.append([np.array(row, np.float32)], 1.0, "w")
    with np.errstate(over="ignore"):
        expected = np.median(np.array(values, np.float32), axis=0)
        np.testing.assert_array_equal(Median()(rows, Occasion()), expected)
