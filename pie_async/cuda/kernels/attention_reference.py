"""Paged attention in plain torch, row by row: what the kernels are compared with."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def _attend(queries: Tensor, kv: Tensor, table: Tensor, start: int, window: int | None) -> Tensor:
    """[tokens, heads * dim] of one row's [tokens, heads, dim] queries, from position `start`."""
    num_tokens, heads, dim = queries.shape
    block_tokens, end = kv.shape[3], start + num_tokens
    slots = table[: -(-end // block_tokens)].long()
    keys, values = kv[slots].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :end].unbind(0)
    group = heads // len(keys)
    keys, values = keys.repeat_interleave(group, 0), values.repeat_interleave(group, 0)
    seen = torch.arange(end, device=kv.device)
    positions = torch.arange(start, end, device=kv.device).unsqueeze(1)
    is_hidden = seen > positions
    if window is not None:
        is_hidden |= seen <= positions - window
    scores = torch.einsum("thd,hsd->hts", queries, keys) * dim**-0.5
    weights = scores.masked_fill(is_hidden, -torch.inf).softmax(-1)
    # Positions before every window may be of freed blocks, and 0 * NaN is NaN.
    values = values.masked_fill(is_hidden.all(0).unsqueeze(1), 0.0)
    return torch.einsum("hts,hsd->thd", weights, values).flatten(1)


def decode_attention_reference(
    queries: Tensor,
    kv: Tensor,
    tables: Tensor,
    lanes: Tensor,
    positions: Tensor,
    *,
    window: int | None,
) -> Tensor:
    """As `decode_attention`, in the dtype of its arguments: [n, heads * dim]; padding is zero."""
    out = queries.new_zeros(len(queries), queries[0].numel())
    for i, (lane, position) in enumerate(zip(lanes.tolist(), positions.tolist(), strict=True)):
        if position >= 0:
            out[i] = _attend(queries[i : i + 1], kv, tables[lane], position, window)
    return out


def prefill_attention_reference(
    queries: Tensor,
    kv: Tensor,
    tables: Tensor,
    rows: Iterable[tuple[int, int, int, int]],
    *,
    window: int | None,
) -> Tensor:
    """As `prefill_attention`, of rows instead of tiles: [n, heads * dim]; other tokens zero."""
    out = queries.new_zeros(len(queries), queries[0].numel())
    for lane, first, num_tokens, start in rows:
        tokens = slice(first, first + num_tokens)
        out[tokens] = _attend(queries[tokens], kv, tables[lane], start, window)
    return out
