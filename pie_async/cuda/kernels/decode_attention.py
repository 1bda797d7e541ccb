"""Attention of one token per row over paged KV, in Triton.

The work of an iteration is cut into units, one tile of a row's KV for one KV head. They stand in
a line, and every program takes an equal share of it, whatever the rows' lengths are (stream-K,
arXiv 2301.03598; FlashInfer, arXiv 2501.01005, plans the same on the host). The grid is fixed and
the shares are found on the device, so a captured graph serves any contexts. Where a program's
share begins or ends within a row's KV, it leaves a partial result; the last program to arrive at
that (row, KV head) merges them, always in the same order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pie_async.cuda.kernels.overlap import await_earlier, overlap
from pie_async.cuda.kernels.paged_attention import (
    LOG2_E,
    LOWEST,
    NO_WINDOW,
    attend,
    first_seen,
    padded_dim,
)

_RECORD = tl.constexpr(8)
"""Numbers of a plan per program: row, KV head, tile, units left, share, position, lane, none."""

_MERGED_NUMBERS = 8192
"""Of the parts' totals, held in registers at once by the program that merges. Half as many take
12 instead of 9.6 us for one row of 1024 tokens, 50 instead of 47 for one of 32768."""


class DecodeConfig(NamedTuple):
    """How the kernel runs; does not change results beyond rounding."""

    tile_tokens: int
    num_warps: int
    num_stages: int
    programs_per_processor: int
    """As many as are resident at once: more would wait for a whole share to end."""


def decode_config(head_dim: int, dtype: torch.dtype) -> DecodeConfig:
    """What is fastest on an H200; `scripts/bench_kernels attention --sweep` measures it anew.

    bfloat16, 32 heads, 8 KV heads, head_dim 128, block_tokens 16, in us, graph replays over KV
    that the L2 does not hold, by rows x context:

        config            64 x 1024   64 x 8192   256 x 512   1 x 1024   1 x 32768
        32, 2, 4, 4          70          503         143          9.4        47
        64, 2, 3, 3          77          504         140          8.8        51
        32, 4, 3, 4          88          639         190         14          64

    The first reads 3.8, 4.3, 3.8, 0.4, 2.9 TB/s. head_dim 64 (as many heads) and head_dim 256
    (16 heads, 8 KV heads):

        64:  64, 2, 4, 4     40          260          76          6.7        27
        64:  32, 2, 4, 4     40          272          81          6.6        27
        256: 32, 4, 3, 2    136          980         261         11          73
        256: 32, 2, 3, 2    138          984         264         11          73

    float32: by what fits, not measured.
    """
    row_bytes = padded_dim(head_dim) * dtype.itemsize
    if row_bytes <= 256:
        return DecodeConfig(64 if row_bytes <= 128 else 32, 2, 4, 4)
    return DecodeConfig(32, 4, 3, 2) if row_bytes <= 512 else DecodeConfig(16, 4, 3, 2)


class DecodeWorkspace:
    """What decode attention needs beside tensors; one for all layers that run in turn.

    Args:
        max_rows: most rows of an iteration.
        num_programs: the grid; None: as many as the device holds at once.
    """

    def __init__(
        self,
        *,
        max_rows: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        block_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
        config: DecodeConfig | None = None,
        num_programs: int | None = None,
    ) -> None:
        self.config = config or decode_config(head_dim, dtype)
        if num_programs is None:
            processors = torch.cuda.get_device_properties(device).multi_processor_count
            num_programs = processors * self.config.programs_per_processor
        self.num_programs = num_programs
        self.kv_heads = kv_heads
        self.alignment = min(block_tokens, self.config.tile_tokens)
        """Rows begin at a multiple of it, so that no tile of a row is hidden from it."""
        group = heads // kv_heads
        # A program cuts at most two (row, KV head) pairs: where it begins and where it ends.
        self.partials = torch.empty(2 * num_programs, group, head_dim, device=device)
        self.statistics = torch.empty(2 * num_programs, 2, group, device=device)
        self.arrivals = torch.zeros(max_rows * kv_heads, dtype=torch.int32, device=device)
        """Zero between launches: whoever merges resets it."""


@triton.jit
def _num_tiles(position, window, ALIGN: tl.constexpr, BLOCK_N: tl.constexpr):
    """At least one, so that padding is written too."""
    return tl.maximum(tl.cdiv(position + 1 - first_seen(position, window, ALIGN), BLOCK_N), 1)


# Small integers may begin anywhere in an upload buffer: nothing is compiled for their alignment.
@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["positions", "lanes"])
def _plan_kernel(
    positions,
    lanes,
    plan,
    num_rows,
    window,
    num_programs,
    KV_HEADS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ROWS: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    rows = tl.arange(0, ROWS)
    is_row = rows < num_rows
    tiles = _num_tiles(tl.load(positions + rows, mask=is_row, other=-1), window, ALIGN, BLOCK_N)
    units = tl.where(is_row, tiles * KV_HEADS, 0)
    ends = tl.cumsum(units, 0)
    num_units = tl.sum(units, 0)
    share = tl.cdiv(num_units, num_programs)

    programs = tl.program_id(0) * PROGRAMS + tl.arange(0, PROGRAMS)
    is_program = programs < num_programs
    begin = programs * share
    left = tl.minimum(tl.maximum(num_units - begin, 0), share)
    is_before = (ends[None, :] <= begin[:, None]) & is_row[None, :]
    row = tl.minimum(tl.sum(is_before.to(tl.int32), 1), num_rows - 1)
    within = begin - tl.sum(tl.where(is_before, units[None, :], 0), 1)
    position = tl.load(positions + row)
    tiles_of_row = _num_tiles(position, window, ALIGN, BLOCK_N)

    record = plan + programs * _RECORD
    tl.store(record, row, mask=is_program)
    tl.store(record + 1, within // tiles_of_row, mask=is_program)
    tl.store(record + 2, within % tiles_of_row, mask=is_program)
    tl.store(record + 3, left, mask=is_program)
    tl.store(record + 4, tl.zeros_like(left) + share, mask=is_program)
    tl.store(record + 5, position, mask=is_program)
    tl.store(record + 6, tl.load(lanes + row), mask=is_program)


@triton.jit
def _merge(
    partials,
    statistics,
    first_program,
    num_parts,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    PARTS: tl.constexpr,
):
    """[MEMBERS, DIM]: the result of the parts that consecutive programs left."""
    members, dims = tl.arange(0, MEMBERS), tl.arange(0, DIM)
    places = members[:, None] * HEAD_DIM + dims[None, :]
    is_place = (members < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    largest = tl.full([MEMBERS], LOWEST, tl.float32)
    weight = tl.zeros([MEMBERS], tl.float32)
    total = tl.zeros([MEMBERS, DIM], tl.float32)
    for first in tl.range(0, num_parts, PARTS):
        parts = first + tl.arange(0, PARTS)
        is_part = parts < num_parts
        # The first began within its program's share, the others where their shares begin.
        slots = 2 * (first_program + parts) + (parts == 0).to(tl.int32)
        found = statistics + slots[:, None] * (2 * GROUP) + members[None, :]
        is_found = is_part[:, None] & (members < GROUP)[None, :]
        part_largest = tl.load(found, mask=is_found, other=LOWEST, cache_modifier=".cg")
        part_weight = tl.load(found + GROUP, mask=is_found, other=0.0, cache_modifier=".cg")
        part_total = tl.load(
            partials + slots[:, None, None] * (GROUP * HEAD_DIM) + places[None, :, :],
            mask=is_part[:, None, None] & is_place[None, :, :],
            other=0.0,
            cache_modifier=".cg",
        )
        new_largest = tl.maximum(largest, tl.max(part_largest, 0))
        shrink = tl.exp2(largest - new_largest)
        part_shrink = tl.exp2(part_largest - new_largest[None, :])
        weight = weight * shrink + tl.sum(part_weight * part_shrink, 0)
        total = total * shrink[:, None] + tl.sum(part_total * part_shrink[:, :, None], 0)
        largest = new_largest
    return total / tl.where(weight > 0.0, weight, 1.0)[:, None]


@triton.jit(do_not_specialize_on_alignment=["tables", "lanes", "positions"])
def _decode_kernel(
    queries,
    kv,
    tables,
    lanes,
    positions,
    plan,
    out,
    partials,
    statistics,
    arrivals,
    scale,
    window,
    query_stride,
    query_head_stride,
    table_stride,
    slot_stride,
    out_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    MEMBERS: tl.constexpr,
    QUERIES: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIM: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    STAGES: tl.constexpr,
    overlaps: tl.constexpr,
):
    await_earlier(overlaps)
    program = tl.program_id(0)
    record = plan + program * _RECORD
    row = tl.load(record)
    head = tl.load(record + 1)
    tile = tl.load(record + 2)
    left = tl.load(record + 3)
    share = tl.load(record + 4)
    position = tl.load(record + 5)
    lane = tl.load(record + 6)
    unit = program * share
    query, dims = tl.arange(0, QUERIES), tl.arange(0, DIM)
    is_query = (query < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]
    member = tl.arange(0, MEMBERS)
    is_member = (member < GROUP)[:, None] & (dims < HEAD_DIM)[None, :]

    while left > 0:
        tiles = _num_tiles(position, window, ALIGN, BLOCK_N)
        taken = tl.minimum(left, tiles - tile)
        start = first_seen(position, window, ALIGN) + tile * BLOCK_N
        stop = tl.minimum(start + taken * BLOCK_N, position + 1)
        first_query = queries + row.to(tl.int64) * query_stride + head * GROUP * query_head_stride
        total, largest, weight = attend(
            tl.zeros([QUERIES, DIM], tl.float32),
            tl.full([QUERIES], LOWEST, tl.float32),
            tl.zeros([QUERIES], tl.float32),
            tl.load(
                first_query + query[:, None] * query_head_stride + dims[None, :],
                mask=is_query,
                other=0.0,
            ),
            kv + head * (BLOCK_TOKENS * HEAD_DIM),
            slot_stride,
            tables + lane * table_stride,
            start,
            stop,
            tl.full([1, 1], 0, tl.int32) + position,
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
        first_out = out + row.to(tl.int64) * out_stride + head * (GROUP * HEAD_DIM)
        if taken == tiles:
            result = total / tl.where(weight > 0.0, weight, 1.0)[:, None]
            tl.store(first_out + query[:, None] * HEAD_DIM + dims[None, :], result, mask=is_query)
        else:
            slot = 2 * program + (tile == 0).to(tl.int32)
            places = slot * (GROUP * HEAD_DIM) + query[:, None] * HEAD_DIM + dims[None, :]
            tl.store(partials + places, total, mask=is_query, cache_modifier=".cg")
            found = statistics + slot * (2 * GROUP) + query
            tl.store(found, largest, mask=query < GROUP, cache_modifier=".cg")
            tl.store(found + GROUP, weight, mask=query < GROUP, cache_modifier=".cg")
            first_program = (unit - tile) // share
            num_parts = (unit - tile + tiles - 1) // share - first_program + 1
            # One thread announces what all have stored.
            tl.debug_barrier()
            arrived = arrivals + row * KV_HEADS + head
            if tl.atomic_add(arrived, 1, sem="acq_rel") == num_parts - 1:
                tl.store(arrived, 0)
                merged = _merge(
                    partials,
                    statistics,
                    first_program,
                    num_parts,
                    GROUP,
                    MEMBERS,
                    HEAD_DIM,
                    DIM,
                    PARTS,
                )
                target = first_out + member[:, None] * HEAD_DIM + dims[None, :]
                tl.store(target, merged, mask=is_member)
        unit += taken
        left -= taken
        tile = 0
        row = tl.where(head + 1 == KV_HEADS, row + 1, row)
        head = tl.where(head + 1 == KV_HEADS, 0, head + 1)
        position = tl.load(positions + row, mask=left > 0, other=-1)
        lane = tl.load(lanes + row, mask=left > 0, other=0)


def plan_decode(
    positions: Tensor, lanes: Tensor, *, window: int | None, workspace: DecodeWorkspace
) -> Tensor:
    """Each program's share of an iteration: once for all layers with this window.

    Args:
        positions, lanes: [n] int32, n <= max_rows; position -1 is padding.
    """
    n, programs = len(positions), workspace.num_programs
    rows = triton.next_power_of_2(n)
    together = max(1, min(8192 // rows, 32))
    plan = torch.empty(programs, _RECORD.value, dtype=torch.int32, device=positions.device)
    _plan_kernel[(triton.cdiv(programs, together),)](
        positions,
        lanes,
        plan,
        n,
        window or NO_WINDOW,
        programs,
        workspace.kv_heads,
        workspace.alignment,
        workspace.config.tile_tokens,
        rows,
        together,
    )
    return plan


def decode_attention(
    queries: Tensor,
    kv: Tensor,
    tables: Tensor,
    lanes: Tensor,
    positions: Tensor,
    *,
    window: int | None,
    plan: Tensor,
    out: Tensor,
    workspace: DecodeWorkspace,
) -> None:
    """Attend from one token per row.

    Args:
        queries: [n, heads, head_dim], last dimension contiguous.
        kv: [slots, 2, kv_heads, block_tokens, head_dim], contiguous within a slot.
        tables: [lanes + 1, max_blocks] int32 slots.
        lanes, positions: [n] int32. Position p sees max(0, p - window + 1) .. p, all in kv;
            -1 is padding, whose result is zero.
        plan: of `plan_decode` for these lanes, positions and this window.
        out: [n, heads * head_dim], written; rows may be strided.
    """
    _, heads, head_dim = queries.shape
    _, _, kv_heads, block_tokens, _ = kv.shape
    dim, members = padded_dim(head_dim), triton.next_power_of_2(heads // kv_heads)
    config = workspace.config
    _decode_kernel[(workspace.num_programs,)](
        queries,
        kv,
        tables,
        lanes,
        positions,
        plan,
        out,
        workspace.partials,
        workspace.statistics,
        workspace.arrivals,
        head_dim**-0.5 * LOG2_E,
        window or NO_WINDOW,
        queries.stride(0),
        queries.stride(1),
        tables.stride(0),
        kv.stride(0),
        out.stride(0),
        kv_heads,
        heads // kv_heads,
        members,
        max(16, members),
        block_tokens,
        head_dim,
        dim,
        workspace.alignment,
        config.tile_tokens,
        max(1, _MERGED_NUMBERS // (members * dim)),
        config.num_stages,
        num_warps=config.num_warps,
        **overlap(queries.device),
    )
