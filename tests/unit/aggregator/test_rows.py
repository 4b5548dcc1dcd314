"""Rows: what a rule that needs all updates is given."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from aggregator.strategies.rows import MemoryRows, MemorySpool, columns, row_of, row_shape
from tests.support.builders import spec_of, update_of, vector

FLOAT32 = np.dtype(np.float32)


def rows_of(*rows: Any, weights: tuple[float, ...] = ()) -> MemoryRows:
    made = MemoryRows(len(rows[0]), FLOAT32)
    for index, row in enumerate(rows):
        made.append([vector(*row)], weights[index] if weights else 1.0, f"w{index}")
    return made


def test_a_row_is_the_parameters_in_the_models_order_without_statistics() -> None:
    tensors = {
        "b": np.array([[1, 2], [3, 4]], np.float16),
        "mean": vector(9, 9),
        "a": np.array(5, ml_dtypes.bfloat16),
        "n": np.array(7, np.int64),
    }
    model = spec_of(tensors, ("mean", "n"))
    rows = MemorySpool().begin(model)

    rows.append(row_of(update_of(tensors, buffers=("mean", "n")), model), 1.0, "w0")

    assert (rows.count, rows.size, rows.dtype, rows.workers) == (1, 5, FLOAT32, ("w0",))
    np.testing.assert_array_equal(rows.row(0), vector(1, 2, 3, 4, 5))


def test_rows_are_wide_if_any_parameter_is() -> None:
    wide = {"a": vector(1), "b": vector(2, dtype=np.float64)}
    assert row_shape(spec_of(wide)) == (2, np.dtype(np.float64))
    assert row_shape(spec_of(wide, ("b",))) == (1, FLOAT32)


def test_what_is_read_is_weighted_and_the_callers_own() -> None:
    rows = rows_of([1, 2, 3], [4, 5, 6], weights=(1.0, 0.5))

    block = rows.block(1, 3)
    np.testing.assert_array_equal(block, [[2, 3], [2.5, 3]])
    block.fill(-1)
    rows.row(0).fill(-1)

    np.testing.assert_array_equal(rows.row(0), [1, 2, 3])
    np.testing.assert_array_equal(rows.row(1), [2, 2.5, 3])
    assert (rows.weights, rows.workers) == ((1.0, 0.5), ("w0", "w1"))


def test_what_was_lent_does_not_see_what_comes_later() -> None:
    rows = rows_of([1, 2])
    lent = rows.lend()

    rows.append([vector(3), vector(4)], 1.0, "w1")

    assert (lent.count, rows.count) == (1, 2)
    assert lent.block(0, 2).shape == (1, 2)
    again = MemorySpool().resume(lent)
    again.append([vector(5, 6)], 1.0, "w2")
    assert (again.workers, rows.workers, lent.workers) == (("w0", "w2"), ("w0", "w1"), ("w0",))


@pytest.mark.parametrize("values", [[1], [1, 2, 3]])
def test_a_row_of_another_length_is_refused_and_nothing_was_added(values: list[float]) -> None:
    rows = rows_of([1, 2])
    with pytest.raises(ValueError, match="a row has 2 elements"):
        rows.append([vector(*values)], 1.0, "w1")
    assert (rows.count, rows.weights, rows.workers) == (1, (1.0,), ("w0",))


@pytest.mark.parametrize(("nbytes", "width"), [(1, 1), (16, 2), (17, 2), (10**9, 5)])
def test_columns_cover_all_elements_in_blocks_of_bounded_size(nbytes: int, width: int) -> None:
    rows = rows_of(range(5), range(5))
    found = list(columns(rows, nbytes))
    assert [start for start, _ in found] == list(range(0, 5, width))
    assert [stop for _, stop in found] == [*(start for start, _ in found[1:]), 5]
    assert all(stop - start <= width for start, stop in found)
