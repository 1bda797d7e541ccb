"""The small integers around an iteration: block tables, token ids, where KV goes.

Everything comes as vectors that may begin anywhere in an upload buffer, so nothing is compiled
for their alignment.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def apply_updates(tables: Tensor, updates: Tensor) -> None:
    """Write slots into the block tables.

    Args:
        tables: [lanes + 1, max_blocks] int32, contiguous.
        updates: [u, 2] int32, contiguous: flat index into the tables and slot. Index -1: padding.
            No index comes twice.
    """
    assert tables.is_contiguous() and updates.is_contiguous()
    if count := len(updates):
        _update_kernel[(triton.cdiv(count, _BLOCK),)](tables, updates, count, _BLOCK, num_warps=4)


def resolve(
    tokens: Tensor,
    lanes: Tensor,
    positions: Tensor,
    last_tokens: Tensor,
    tables: Tensor,
    block_tokens: int,
) -> tuple[Tensor, Tensor]:
    """What the fed tokens are and where their KV goes.

    Args:
        tokens: [n] int32; -1: what the lane sampled last.
        lanes: [n] int32.
        positions: [n] int32; -1: padding.
        last_tokens: [lanes + 1] int64.
        tables: [lanes + 1, max_blocks] int32 slots, contiguous.
        block_tokens: a power of two.

    Returns:
        [n] int64 token ids, 0 for padding; [n] int64 places, slot * block_tokens + offset in the
        block, -1 for padding.
    """
    assert tables.is_contiguous()
    count = len(tokens)
    token_ids, places = torch.empty((2, count), dtype=torch.int64, device=tokens.device).unbind(0)
    if count:
        _resolve_kernel[(triton.cdiv(count, _BLOCK),)](
            tokens,
            lanes,
            positions,
            last_tokens,
            tables,
            token_ids,
            places,
            count,
            tables.shape[1],
            block_tokens,
            _BLOCK,
            num_warps=4,
        )
    return token_ids, places


def remember(last_tokens: Tensor, lanes: Tensor, tokens: Tensor) -> None:
    """Keep the tokens that lanes sampled, for `resolve` in the next iteration.

    Args:
        last_tokens: [lanes + 1] int64; the last one belongs to padding and is left as it is.
        lanes: [n] int32, distinct but for padding.
        tokens: [n] int64.
    """
    if count := len(lanes):
        _remember_kernel[(triton.cdiv(count, _BLOCK),)](
            last_tokens, lanes, tokens, count, len(last_tokens) - 1, _BLOCK, num_warps=4
        )


def apply_updates_reference(tables: Tensor, updates: Tensor) -> None:
    """`apply_updates` in plain torch."""
    where, slots = updates[updates[:, 0] >= 0].unbind(1)
    tables.view(-1)[where.long()] = slots


def resolve_reference(
    tokens: Tensor,
    lanes: Tensor,
    positions: Tensor,
    last_tokens: Tensor,
    tables: Tensor,
    block_tokens: int,
) -> tuple[Tensor, Tensor]:
    """`resolve` in plain torch."""
    lane, position = lanes.long(), positions.long()
    is_padding = position < 0
    token_ids = torch.where(tokens < 0, last_tokens[lane], tokens.long())
    position = position.clamp(min=0)
    slots = tables[lane, position // block_tokens].long()
    places = slots * block_tokens + position % block_tokens
    return token_ids.masked_fill(is_padding, 0), places.masked_fill(is_padding, -1)


def remember_reference(last_tokens: Tensor, lanes: Tensor, tokens: Tensor) -> None:
    """`remember` in plain torch."""
    is_real = lanes < len(last_tokens) - 1
    last_tokens[lanes[is_real].long()] = tokens[is_real]


_BLOCK = 128


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["updates"])
def _update_kernel(tables, updates, count, block: tl.constexpr):
    entries = tl.program_id(0) * block + tl.arange(0, block)
    is_inside = entries < count
    where = tl.load(updates + 2 * entries, is_inside, -1)
    slots = tl.load(updates + 2 * entries + 1, is_inside, 0)
    tl.store(tables + where, slots, is_inside & (where >= 0))


@triton.jit(
    do_not_specialize=["count"],
    do_not_specialize_on_alignment=["tokens", "lanes", "positions", "token_ids", "places"],
)
def _resolve_kernel(
    tokens,
    lanes,
    positions,
    last_tokens,
    tables,
    token_ids,
    places,
    count,
    max_blocks,
    block_tokens: tl.constexpr,
    block: tl.constexpr,
):
    fed = tl.program_id(0) * block + tl.arange(0, block)
    is_inside = fed < count
    position = tl.load(positions + fed, is_inside, -1)
    lane = tl.load(lanes + fed, is_inside, 0).to(tl.int64)
    token = tl.load(tokens + fed, is_inside, 0).to(tl.int64)
    is_real = position >= 0
    last = tl.load(last_tokens + lane, is_real & (token < 0), 0)
    token = tl.where(token < 0, last, token)
    slot = tl.load(tables + lane * max_blocks + position // block_tokens, is_real, 0)
    place = slot.to(tl.int64) * block_tokens + position % block_tokens
    tl.store(token_ids + fed, tl.where(is_real, token, 0), is_inside)
    tl.store(places + fed, tl.where(is_real, place, -1), is_inside)


@triton.jit(do_not_specialize=["count"], do_not_specialize_on_alignment=["lanes", "tokens"])
def _remember_kernel(last_tokens, lanes, tokens, count, num_lanes, block: tl.constexpr):
    rows = tl.program_id(0) * block + tl.arange(0, block)
    is_inside = rows < count
    lane = tl.load(lanes + rows, is_inside, num_lanes)
    token = tl.load(tokens + rows, is_inside, 0)
    tl.store(last_tokens + lane, token, is_inside & (lane < num_lanes))
