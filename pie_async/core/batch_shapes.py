"""The sizes that iterations are padded to, so that a few captured ones (CUDA graphs) serve all."""

from __future__ import annotations

from collections.abc import Sequence

from pie_async.messages import Row

SPARE_ROWS = 16
"""Rows of several tokens that an iteration may have beside `largest` rows of one."""
PROMPT_SIZES = (64, 128, 192, 256, 384, 512)
"""What the tokens of such rows, together, are padded to: beside many sequences padding is computed
in earnest (32 requests/s of a 32B shape: without 192 and 384 iterations are a tenth longer, as far
as the simulator can tell). More tokens keep the GPU busy for as long as it takes to launch their
kernels."""
_DECODE_SIZES = (8, 32, 64, 128, 160, 192, 224)
"""Close together where padding is computed in earnest: below, reading the weights takes as long."""

BatchShape = tuple[int, int]
"""Rows of one token, and the tokens of all other rows together; each with padding."""


def batch_shape(rows: Sequence[Row], *, largest: int, max_tokens: int) -> BatchShape | None:
    """What these rows are padded to; None: they are run as they are.

    Args:
        rows: at least one, in any order.
        largest: most rows of one token.
        max_tokens: most tokens of an iteration.
    """
    largest = min(largest, max_tokens)
    prompts = [row.num_tokens for row in rows if row.num_tokens > 1]
    if not prompts:
        bucket = bucket_of(len(rows), largest)
        return None if bucket is None else (bucket, 0)
    if len(prompts) > SPARE_ROWS:
        return None
    decode = _next_size(len(rows) - len(prompts), _decode_sizes(largest))
    tokens = _next_size(sum(prompts), _prompt_sizes(max_tokens))
    return None if decode is None or tokens is None else (decode, tokens)


def batch_shapes(largest: int, max_tokens: int) -> list[BatchShape]:
    """All that `batch_shape` gives, those with prompts first, then falling."""
    largest = min(largest, max_tokens)
    mixed = [
        (decode, tokens)
        for tokens in reversed(_prompt_sizes(max_tokens))
        for decode in reversed(_decode_sizes(largest))
    ]
    return mixed + [(bucket, 0) for bucket in reversed(buckets(largest))]


def bucket_of(num_rows: int, largest: int) -> int | None:
    """The padded batch size that `num_rows` rows of one token are run with; None: too many.

    1, 2, 4, then multiples of 8 to 64, of 16 to 256, of 32 beyond: from 128 rows on, where an
    iteration costs more than reading the weights, at most an eighth is added.
    """
    if num_rows > largest:
        return None
    for size in (1, 2, 4):
        if num_rows <= size:
            return min(size, largest)
    step = 8 if num_rows <= 64 else 16 if num_rows <= 256 else 32
    return min(-(-num_rows // step) * step, largest)


def buckets(largest: int) -> list[int]:
    """All sizes that `bucket_of` gives, rising."""
    return sorted({bucket_of(rows, largest) or largest for rows in range(1, largest + 1)})


def _decode_sizes(largest: int) -> list[int]:
    return [*(size for size in _DECODE_SIZES if size < largest), largest] if largest else []


def _prompt_sizes(max_tokens: int) -> list[int]:
    return [size for size in PROMPT_SIZES if size <= max_tokens]


def _next_size(number: int, sizes: Sequence[int]) -> int | None:
    return next((size for size in sizes if number <= size), None)
