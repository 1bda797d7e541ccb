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

    Args:
        kv: [slots, 2, block_tokens, kv_heads, head_dim], contiguous; keys, then values.
    """

    def __init__(self, kv: Tensor) -> None:
        slots, _, self.block_tokens, self.kv_heads, self.head_dim = kv.shape
        row = self.kv_heads * self.head_dim
        self.halves = kv.view(slots * 2, self.block_tokens * row)
        """Row 2s: the keys of slot s; row 2s + 1: its values."""
        self.tokens = kv.view(slots * 2 * self.block_tokens, row)
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
    """[n] rows of `PagedKv.tokens`."""
    values: Tensor
    fresh: Tensor | None
    """Rows of `PagedKv.halves` to zero first: blocks that begin here and are not filled."""

    def apply(self, kv: PagedKv, keys: Tensor, values: Tensor) -> None:
        if self.fresh is not None:
            kv.halves.index_fill_(0, self.fresh, 0.0)
        kv.tokens.index_copy_(0, self.keys, keys.flatten(1))
        kv.tokens.index_copy_(0, self.values, values.flatten(1))


class DecodeBatch(msgspec.Struct, frozen=True):
    """Rows of one token each that attend together, padded to the longest."""

    tokens: slice
    """Their fed tokens."""
    vectors: Tensor
    """[2 * rows * kv_heads * positions] rows of `PagedKv.vectors`: keys, then values."""
    mask: Tensor
    """[rows * kv_heads, 1, positions], added to the scores."""

    def attend(
        self, kv: PagedKv, workspace: Workspace, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """[rows, heads * head_dim] for the iteration's [n, heads, head_dim] queries."""
        del keys, values  # already written, and gathered with the others
        # Heads first, so that one row's head is a contiguous matrix: gathering single vectors
        # takes half as long again as whole blocks, but the products then take less than half.
        batch = len(self.mask)
        found = workspace.gather(kv.vectors, self.vectors).view(2, batch, -1, kv.head_dim)
        q = queries[self.tokens].reshape(batch, -1, kv.head_dim)
        if q.dtype == torch.float32:
            scores = torch.baddbmm(self.mask, q, found[0].mT, alpha=kv.head_dim**-0.5)
            attended = torch.bmm(scores.softmax(-1), found[1])
        else:
            attended = functional.scaled_dot_product_attention(
                q, found[0], found[1], attn_mask=self.mask
            )
        return attended.view(batch // kv.kv_heads, -1)


class PrefillRow(msgspec.Struct, frozen=True):
    """One row of several tokens."""

    tokens: slice
    halves: Tensor | None
    """[2 * blocks] rows of `PagedKv.halves`: keys, then values. None: a prompt from its start,
    which needs nothing but what it brings."""
    positions: int
    """Positions it attends to."""
    mask: Tensor | None
    """[tokens, positions], added to the scores; None: causal."""

    def attend(
        self, kv: PagedKv, workspace: Workspace, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """[tokens, heads * head_dim] for the iteration's [n, heads, head_dim] queries."""
        if self.halves is None:
            k, v = keys[self.tokens], values[self.tokens]
        else:
            found = workspace.gather(kv.halves, self.halves)
            k, v = found.view(2, -1, kv.kv_heads, kv.head_dim)[:, : self.positions]
        attended = functional.scaled_dot_product_attention(
            queries[self.tokens].transpose(0, 1).unsqueeze(0),
            k.transpose(0, 1).unsqueeze(0),
            v.transpose(0, 1).unsqueeze(0),
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
