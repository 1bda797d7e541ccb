"""What iterations are padded to."""

from __future__ import annotations

import pytest

from pie_async.core.batch_shapes import SPARE_ROWS, batch_shape, batch_shapes, bucket_of, buckets
from pie_async.ids import Lane, SequenceId
from pie_async.messages import Row


def rows_of(*num_tokens: int) -> list[Row]:
    return [Row(SequenceId(n), Lane(n), 0, tuple(range(k)), True) for n, k in enumerate(num_tokens)]


@pytest.mark.parametrize(
    ("num_tokens", "shape"),
    [
        ((1,), (1, 0)),
        ((1,) * 5, (8, 0)),
        ((1,) * 65, (80, 0)),
        ((2,), (8, 64)),
        ((1, 1, 100, 29), (8, 192)),
        ((1,) * 200 + (512,), (224, 512)),
    ],
)
def test_rows_are_padded_to_the_next_captured_shape(num_tokens, shape):
    assert batch_shape(rows_of(*num_tokens), largest=256, max_tokens=8192) == shape
    assert shape in batch_shapes(256, 8192)


@pytest.mark.parametrize(
    "num_tokens", [(1,) * 257, (513,), (300, 300), (2,) * (SPARE_ROWS + 1), (1,) * 257 + (2,)]
)
def test_what_is_too_large_for_all_of_them_is_run_as_it_is(num_tokens):
    assert batch_shape(rows_of(*num_tokens), largest=256, max_tokens=8192) is None


def test_an_iterations_most_tokens_leave_the_larger_sizes_out():
    assert batch_shape(rows_of(2, 2), largest=4, max_tokens=64) == (4, 64)
    assert batch_shape(rows_of(2, 2), largest=4, max_tokens=63) is None
    assert batch_shapes(4, 128) == [(4, 128), (4, 64), (4, 0), (2, 0), (1, 0)]
    assert batch_shape(rows_of(1, 1, 1), largest=256, max_tokens=3) == (3, 0)
    assert batch_shapes(256, 3) == [(3, 0), (2, 0), (1, 0)]


def test_with_nothing_captured_nothing_is_padded():
    assert batch_shape(rows_of(1), largest=0, max_tokens=64) is None
    assert batch_shapes(0, 64) == []


def test_from_128_rows_on_an_eighth_is_added_at_most():
    assert buckets(6) == [1, 2, 4, 6]
    for rows in range(128, 600):
        size = bucket_of(rows, 1024)
        assert size is not None and rows <= size <= rows * 1.125
