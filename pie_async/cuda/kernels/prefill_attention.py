"""Attention of several tokens per row over paged KV, in Triton: causal, chunked, FlashAttention.

A program takes a tile: some tokens of one row with all the query heads of one KV head, which fill
the rows of one matrix product. Fewer tokens than rows make the triangle that is computed and
masked smaller.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pie_async.cuda.kernels.paged_attention import (
    LOG2_E,
    LOWEST,
    NO_WINDOW,
    attend,
    first_seen,
    padded_dim,
)


class PrefillConfig(NamedTuple):
    """How the kernel runs; does not change results beyond rounding."""

    tile_rows: int
    """Queries of a tile: tokens times the query heads of a KV head."""
    tile_tokens: int
    """KV tokens taken at once."""
    num_warps: int
    num_stages: int


def prefill_config(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> PrefillConfig:
    """What is fastest on an H200; `scripts/bench_kernels attention --sweep` measures it anew.

    bfloat16, head_dim 128, block_tokens 16, in TFLOP/s of the causal half; 32 heads and 8 KV
    heads, but 40 of both in the last column:

        config           8 x 2048   512 at 8192   4 x 512   4 x 2048, 40 heads
        64, 64, 4, 3       337         379          187        329
        64, 32, 4, 3       352         318          204        342
        128, 64, 8, 3      340         353          182        313

    head_dim 64 (as many heads) and head_dim 256 (16 heads, 8 KV heads):

        64:  64, 64, 4, 3      322     318          165
        64:  128, 64, 8, 3     325     275          158
        256: 128, 64, 8, 2     405     213          174
        256: 64, 32, 4, 3      251     263          146

    float32: by what fits, not measured.
    """
    dim = padded_dim(head_dim)
    if dtype == torch.float32:  # no tensor cores: their float32 is not exact
        config = PrefillConfig(32, 32, 8, 2) if dim <= 128 else PrefillConfig(16, 16, 4, 2)
    else:
        config = PrefillConfig(64, 64, 4, 3) if dim <= 128 else PrefillConfig(128, 64, 8, 2)
    group = triton.next_power_of_2(heads // kv_heads)
    return config._replace(tile_rows=max(config.tile_rows, group))


def prefill_tiles(
    rows: Iterable[tuple[int, int, int, int]], *, heads: int, kv_heads: int, config: PrefillConfig
) -> Tensor:
    """Cut rows into tiles: [num_tiles, 4] int32 on the CPU, those that see most first,
    more or less.

    Args:
        rows: of (lane, first token, number of tokens, position of the first token).
    """
    step = config.tile_rows // (heads // kv_heads)
    tiles = [
        (lane, first + done, min(step, num_tokens - done), start + done)
        # A row's tiles together, since they read the same KV; the grid ends with short ones.
        for lane, first, num_tokens, start in sorted(rows, key=lambda row: -(row[2] + row[3]))
        for done in reversed(range(0, num_tokens, step))
    ]
    return torch.tensor(tiles, dtype=torch.int32).view(-1, 4)


# Small integers may begin anywhere in an upload buffer: nothing is compiled for their alignment.
@triton.jit(do_not_specialize_on_alignment=["tables", "tiles"])
def _prefill_kernel(
    queries,
    kv,
    tables,
    tiles,
    out,
    scale,
    window,
    query_stride,
    query_head_stride,
    table_stride,
    slot_stride,
    out_stride,
    HAS_WINDOW: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    tile = tiles + tl.program_id(0) // KV_HEADS * 4
    head = tl.program_id(0) % KV_HEADS
    lane = tl.load(tile)
    if lane < 0:
        return
    first_token = tl.load(tile + 1)
    num_tokens = tl.load(tile + 2)
    start = tl.load(tile + 3)

    rows, dims = tl.arange(0, BLOCK_M), tl.arange(0, DIM)
    token = rows // GROUP
    query_head = head * GROUP + rows % GROUP
    is_query = (token < num_tokens)[:, None] & (dims < HEAD_DIM)[None, :]
    tokens = (first_token + token).to(tl.int64)
    query = tl.load(
        queries + (tokens * query_stride + query_head * query_head_stride)[:, None] + dims[None, :],
        mask=is_query,
        other=0.0,
    )
    positions = (start + tl.minimum(token, num_tokens - 1))[:, None]
    keys = kv + head * (BLOCK_TOKENS * HEAD_DIM)
    table = tables + lane * table_stride
    total = tl.zeros([BLOCK_M, DIM], tl.float32)
    largest = tl.full([BLOCK_M], LOWEST, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)

    # Of begin .. end, all queries see all_begin .. all_end, and only the rest needs a mask.
    end = start + num_tokens
    begin = first_seen(start, window, ALIGN)
    all_end = begin + (start + 1 - begin) // BLOCK_N * BLOCK_N
    all_begin = begin
    if HAS_WINDOW:
        hidden = tl.maximum(end - window - begin, 0)
        all_begin = tl.minimum(begin + tl.cdiv(hidden, BLOCK_N) * BLOCK_N, all_end)
        total, largest, weight = attend(
            total,
            largest,
            weight,
            query,
            keys,
            slot_stride,
            table,
            begin,
            all_begin,
            positions,
            window,
            scale,
            True,
            KV_HEADS,
            BLOCK_TOKENS,
            HEAD_DIM,
            DIM,
            BLOCK_N,
            STAGES,
        )
    total, largest, weight = attend(
        total,
        largest,
        weight,
        query,
        keys,
        slot_stride,
        table,
        all_begin,
        all_end,
        positions,
        window,
        scale,
        False,
        KV_HEADS,
        BLOCK_TOKENS,
        HEAD_DIM,
        DIM,
        BLOCK_N,
        STAGES,
    )
    total, largest, weight = attend(
        total,
        largest,
        weight,
        query,
        keys,
        slot_stride,
        table,
        all_end,
        end,
        positions,
        window,
        scale,
        True,
        KV_HEADS,
        BLOCK_TOKENS,
        HEAD_DIM,
        DIM,
        BLOCK_N,
        STAGES,
    )
    result = total / weight[:, None]
    target = out + (tokens * out_stride + query_head * HEAD_DIM)[:, None] + dims[None, :]
    tl.store(target, result, mask=is_query)


def prefill_attention(
    queries: Tensor,
    kv: Tensor,
    tables: Tensor,
    tiles: Tensor,
    *,
    window: int | None,
    out: Tensor,
    config: PrefillConfig,
) -> None:
    """Attend from chunks of rows, each token to the row's KV up to its own position.

    Args:
        queries: [n, heads, head_dim], last dimension contiguous.
        kv: [slots, 2, kv_heads, block_tokens, head_dim], contiguous within a slot; holds the
            chunks' own KV.
        tables: [lanes + 1, max_blocks] int32 slots.
        tiles: [num_tiles, 4] int32, of `prefill_tiles` with this config; lane -1 is padding.
        window: position p sees max(0, p - window + 1) .. p.
        out: [n, heads * head_dim]; rows may be strided. Tokens in no tile are not written.
    """
    _, heads, head_dim = queries.shape
    _, _, kv_heads, block_tokens, _ = kv.shape
    _prefill_kernel[(len(tiles) * kv_heads,)](
        queries,
        kv,
        tables,
        tiles,
        out,
        head_dim**-0.5 * LOG2_E,
        window or NO_WINDOW,
        queries.stride(0),
        queries.stride(1),
        tables.stride(0),
        kv.stride(0),
        out.stride(0),
        window is not None,
        kv_heads,
        heads // kv_heads,
        block_tokens,
        head_dim,
        padded_dim(head_dim),
        min(block_tokens, config.tile_tokens),
        config.tile_rows,
        config.tile_tokens,
        config.num_stages,
        num_warps=config.num_warps,
    )
