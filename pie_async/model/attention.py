"""Attention over paged KV, in plain torch.

A plan is made once per iteration (`attention_plan.py`) and used by every layer: which numbers
of the layer's KV to write, which to gather, and the masks. What a row attends to depends on its
block table only through the numbers found there, never on where they lie, so moving blocks
between slots leaves every result the same to the last bit.

Decode rows are gathered into a padded batch. Padding must not read what nobody wrote (a freed
slot may hold NaN, and 0 * NaN is NaN): it repeats one of the row's own blocks, and a block
that a row begins is zeroed first, so the part it has not filled yet is finite and is masked.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import torch
from torch import Tensor
from torch.nn import functional


class PagedKv:
    """One layer's KV and the ways to look at it.

    A head's tokens lie side by side, so that gathering blocks gives each head one contiguous
    matrix.

    Args:
        kv: [slots, 2, kv_heads, block_tokens, head_dim], contiguous.
    """

    def __init__(self, kv: Tensor) -> None:
        slots, _, self.kv_heads, self.block_tokens, self.head_dim = kv.shape
        self.blocks = kv.view(slots, -1)
        self.heads = kv.view(slots * 2 * self.kv_heads, -1)
        """Row (2 s + half) kv_heads + h: keys (half 0) or values (1) of head h in slot s."""
        self.vectors = kv.view(-1, self.head_dim)
        self.block_bytes = kv[0].numel() * kv.element_size()


class Workspace:
    """Memory that gathers share, one after the other, and that outlives iterations.

    Fresh memory for every gather costs as much in page faults as the gather itself.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def gather(self, source: Tensor, rows: Tensor) -> Tensor:
        """These rows of a matrix; overwritten by the next gather."""
        width = source.shape[1]
        needed = len(rows) * width
        if len(self._memory) < needed:
            # Let go of the old before allocating: contexts grow a little in every iteration.
            self._memory = self._memory.new_empty(0)
            self._memory = self._memory.new_empty(needed * 5 // 4)
        found = self._memory[:needed].view(-1, width)
        return torch.index_select(source, 0, rows, out=found)


class Writes(msgspec.Struct, frozen=True):
    """Where the fed tokens' KV goes."""

    keys: Tensor
    """[n * kv_heads] rows of `PagedKv.vectors`."""
    values: Tensor
    fresh: Tensor | None
    """Slots to zero first: blocks that begin here and are not filled."""

    def apply(self, kv: PagedKv, keys: Tensor, values: Tensor) -> None:
        if self.fresh is not None:
            kv.blocks.index_fill_(0, self.fresh, 0.0)
        kv.vectors.index_copy_(0, self.keys, keys.flatten(0, 1))
        kv.vectors.index_copy_(0, self.values, values.flatten(0, 1))


class DecodeBatch(msgspec.Struct, frozen=True):
    """Rows of one token each that attend together, padded to the longest."""

    tokens: slice
    """Their fed tokens."""
    heads: Tensor
    """[2 * rows * kv_heads * blocks] rows of `PagedKv.heads`: keys, then values."""
    mask: Tensor
    """[rows, 1, positions], added to the scores."""

    def attend(
        self, kv: PagedKv, workspace: Workspace, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """[rows, heads * head_dim] for the iteration's [n, heads, head_dim] queries."""
        del keys, values  # already written, and gathered with the others
        rows, size = len(self.mask), kv.head_dim
        queries = queries[self.tokens]
        found = workspace.gather(kv.heads, self.heads)
        if queries.dtype != torch.float32:
            k, v = found.view(2, rows, kv.kv_heads, -1, size)
            q = queries.reshape(rows, kv.kv_heads, -1, size)
            mask = self.mask.unsqueeze(1)
            return functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).view(rows, -1)
        # Two batched products: for so few queries they beat the fused kernel by a quarter.
        k, v = found.view(2, rows * kv.kv_heads, -1, size)
        scores = torch.bmm((queries * size**-0.5).view(len(k), -1, size), k.mT)
        scores.view(rows, -1, scores.shape[-1]).add_(self.mask)
        return torch.bmm(scores.softmax(-1), v).view(rows, -1)


class PrefillRow(msgspec.Struct, frozen=True):
    """One row of several tokens."""

    tokens: slice
    heads: Tensor | None
    """[2 * kv_heads * blocks] rows of `PagedKv.heads`: keys, then values. None: a prompt from
    its start, which needs nothing but what it brings."""
    positions: int
    """Positions it attends to."""
    mask: Tensor | None
    """[tokens, positions], added to the scores; None: causal."""

    def attend(
        self, kv: PagedKv, workspace: Workspace, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """[tokens, heads * head_dim] for the iteration's [n, heads, head_dim] queries."""
        if self.heads is None:
            k, v = keys[self.tokens].transpose(0, 1), values[self.tokens].transpose(0, 1)
        else:
            found = workspace.gather(kv.heads, self.heads)
            k, v = found.view(2, kv.kv_heads, -1, kv.head_dim)[:, :, : self.positions]
        attended = functional.scaled_dot_product_attention(
            queries[self.tokens].transpose(0, 1).unsqueeze(0),
            k.unsqueeze(0),
            v.unsqueeze(0),
            attn_mask=self.mask,
            is_causal=self.mask is None,
            enable_gqa=True,
        )
        return attended.squeeze(0).transpose(0, 1).flatten(1)


class AttentionPlan:
    """What every layer with the same window does in one iteration.

    Args:
        parts: in the order of the fed tokens.
    """

    def __init__(
        self, writes: Writes, parts: Sequence[DecodeBatch | PrefillRow], workspace: Workspace
    ) -> None:
        self._writes = writes
        self._parts = parts
        self._workspace = workspace

    def attend(self, kv: PagedKv, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write keys and values, then attend: [n, heads * head_dim].

        Args:
            kv: the layer's KV.
            queries: [n, heads, head_dim].
            keys, values: [n, kv_heads, head_dim].
        """
        self._writes.apply(kv, keys, values)
        results = [part.attend(kv, self._workspace, queries, keys, values) for part in self._parts]
        return results[0] if len(results) == 1 else torch.cat(results)
