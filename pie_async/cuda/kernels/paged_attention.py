"""What decode and prefill attention share: one tile of queries over a stretch of paged KV.

The online softmax of FlashAttention (arXiv 2205.14135), in powers of two. KV is
[slots, 2, kv_heads, block_tokens, head_dim], so the keys of one head in one slot are contiguous;
slots may be apart.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = 1.4426950408889634
NO_WINDOW = 1 << 30
"""A window that no position reaches."""
LOWEST = tl.constexpr(-1.0e30)
"""Stands for minus infinity where differences are taken: those of infinities are NaN."""


def padded_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two, as Triton wants, and no fewer than its products take."""
    return max(16, int(triton.next_power_of_2(head_dim)))


@triton.jit
def first_seen(position, window, ALIGN: tl.constexpr):
    """The first token that this position sees, rounded down within its block."""
    return tl.maximum(position + 1 - window, 0) // ALIGN * ALIGN


@triton.jit
def attend(
    total,
    largest,
    weight,
    queries,
    keys,
    slot_stride,
    table,
    start,
    stop,
    positions,
    window,
    scale,
    IS_MASKED: tl.constexpr,
    KV_HEADS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Add the tokens start .. stop - 1 to a running softmax: (total, largest, weight).

    Args:
        total, largest, weight: [M, DIM], [M], [M] float32: weighted sum of values, largest
            score, sum of weights, so far.
        queries: [M, DIM].
        keys: where the head's keys of slot 0 begin.
        slot_stride: numbers from one slot to the next.
        table: where the lane's block table begins.
        positions: of the queries, [M, 1] or, one for all, [1, 1].
        scale: of the scores, times log2(e).
        IS_MASKED: not every query sees all of these tokens. Then nothing at or after `stop` is
            read: it may hold NaN. Otherwise stop - start is a multiple of BLOCK_N.
    """
    half: tl.constexpr = KV_HEADS * BLOCK_TOKENS * HEAD_DIM
    dims = tl.arange(0, DIM)
    offsets = tl.arange(0, BLOCK_N)
    ahead = start + offsets
    slots = tl.load(table + ahead // BLOCK_TOKENS, mask=ahead < stop, other=0)
    for first in tl.range(start, stop, BLOCK_N, num_stages=STAGES):
        tokens = first + offsets
        places = slots.to(tl.int64) * slot_stride + tokens % BLOCK_TOKENS * HEAD_DIM
        pointers = keys + places[:, None] + dims[None, :]
        if IS_MASKED or HEAD_DIM < DIM:
            is_there = (tokens < stop)[:, None] & (dims < HEAD_DIM)[None, :]
            key = tl.load(pointers, mask=is_there, other=0.0)
            value = tl.load(pointers + half, mask=is_there, other=0.0)
        else:
            key = tl.load(pointers)
            value = tl.load(pointers + half)
        # A tile early: the loads above would else wait for it in every round.
        ahead = tokens + BLOCK_N
        slots = tl.load(table + ahead // BLOCK_TOKENS, mask=ahead < stop, other=0)

        scores = tl.dot(queries, tl.trans(key), input_precision="ieee")
        if IS_MASKED:
            seen = tokens[None, :]
            is_seen = (seen < stop) & (seen <= positions) & (seen > positions - window)
            scores = tl.where(is_seen, scores, float("-inf"))
        # Scaled here, not above: one multiply-add for each score instead of two operations.
        new_largest = tl.maximum(largest, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_largest[:, None])
        shrink = tl.exp2(largest - new_largest)
        weight = weight * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None]
        total = tl.dot(weights.to(value.dtype), value, total, input_precision="ieee")
        largest = new_largest
    return total, largest, weight
