"""Rows of the token embedding, with learned positions added where a model has them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional


def embed(
    token_ids: Tensor,
    table: Tensor,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """The fed tokens' first hidden state.

    Args:
        token_ids: [n] integers, rows of the table.
        table: [vocab, hidden].
        positions: [n] integers; padding is negative and gets the first position's row.
        position_table: [rows, hidden]; position p is row p + offset.

    Returns:
        [n, hidden], the sum rounded to the table's dtype.
    """
    rows, hidden = len(token_ids), table.shape[1]
    assert table.stride(1) == 1
    assert position_table is None or position_table.stride(1) == 1
    out = torch.empty((rows, hidden), dtype=table.dtype, device=table.device)
    if rows:
        _embed_kernel[(rows, triton.cdiv(hidden, _BLOCK))](
            token_ids,
            table,
            positions,
            position_table,
            out,
            hidden,
            table.stride(0),
            0 if position_table is None else position_table.stride(0),
            offset,
            block=_BLOCK,
            num_warps=4,
        )
    return out


def embed_reference(
    token_ids: Tensor,
    table: Tensor,
    positions: Tensor | None = None,
    position_table: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """`embed` in plain torch."""
    x = functional.embedding(token_ids, table)
    if positions is None or position_table is None:
        return x
    return x + functional.embedding(positions.clamp(min=0) + offset, position_table)


_BLOCK = 1024


@triton.jit(do_not_specialize_on_alignment=["token_ids", "positions"])
def _embed_kernel(
    token_ids,
    table,
    positions,
    position_table,
    out,
    hidden,
    table_stride,
    position_stride,
    offset,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * block + tl.arange(0, block)
    is_inside = columns < hidden
    token = tl.load(token_ids + row).to(tl.int64)
    values = tl.load(table + token * table_stride + columns, is_inside, 0.0)
    if position_table is not None:
        position = tl.maximum(tl.load(positions + row).to(tl.int64), 0) + offset
        learned = tl.load(position_table + position * position_stride + columns, is_inside, 0.0)
        values = (values.to(tl.float32) + learned.to(tl.float32)).to(values.dtype)
    tl.store(out + row * hidden + columns, values, is_inside)
