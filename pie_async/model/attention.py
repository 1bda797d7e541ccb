"""Attention over paged KV, in plain torch.

A plan is made once per iteration and used by every layer: which numbers of the layer's KV to
write, which to gather, and the masks. What a row attends to depends on its block table only
through the numbers found there, never on where they lie, so moving blocks between slots leaves
every result the same to the last bit.

Decode rows are gathered into a padded batch. Padding must not read what nobody wrote (a freed
slot may hold NaN, and 0 * NaN is NaN): it repeats one of the row's own blocks, and a block
that a row begins is zeroed first, so the part it has not filled yet is finite and is masked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import torch
from torch import Tensor
from torch.nn import functional

_SPLIT_BYTES = 512 * 1024
"""Padding, per layer, that costs more than the calls of one more batch (measured, 2 cores)."""


class Span(msgspec.Struct, frozen=True):
    """One row's tokens of an iteration, as attention sees them."""

    lane: int
    start: int
    """Position of its first fed token."""
    num_tokens: int

    @property
    def end(self) -> int:
        return self.start + self.num_tokens


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
        self.block_bytes = kv[0].numel() * kv.element_size()


class Workspace:
    """Memory that gathers share, one after the other, and that outlives iterations.

    Fresh memory for every gather costs as much in page faults as the gather itself.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._memory = torch.empty(0, dtype=dtype, device=device)

    def rows(self, count: int, width: int) -> Tensor:
        """[count, width], overwritten by whoever asks next."""
        needed = count * width
        if len(self._memory) < needed:
            # Let go of the old before allocating: contexts grow a little in every iteration.
            dtype, device = self._memory.dtype, self._memory.device
            self._memory = torch.empty(0, dtype=dtype, device=device)
            self._memory = torch.empty(needed * 5 // 4, dtype=dtype, device=device)
        return self._memory[:needed].view(count, width)


class _Writes(msgspec.Struct, frozen=True):
    """Where the fed tokens' KV goes."""

    keys: Tensor
    """[n] rows of `PagedKv.tokens`."""
    values: Tensor
    fresh: Tensor | None
    """Rows of `PagedKv.halves` to zero first: blocks that begin here and are not filled."""


class _Gather(msgspec.Struct, frozen=True):
    """Rows that attend together: decode rows, or one prefill row."""

    tokens: slice
    """Their fed tokens."""
    halves: Tensor | None
    """[2 * rows * blocks] rows of `PagedKv.halves`: all keys, then all values. None: a prompt
    from its start, which needs nothing but what it brings."""
    rows: int
    """Decode rows; 0 for a prefill row."""
    context: int
    """Positions attended to, padding counted in."""
    mask: Tensor | None
    """Added to the scores; None: causal."""


class AttentionPlan:
    """What every layer with the same window does in one iteration."""

    def __init__(self, writes: _Writes, gathers: Sequence[_Gather], workspace: Workspace) -> None:
        self._writes = writes
        self._gathers = gathers
        self._workspace = workspace

    def attend(self, kv: PagedKv, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Write keys and values, then attend: [n, heads * head_dim].

        Args:
            kv: the layer's KV.
            queries: [n, heads, head_dim].
            keys, values: [n, kv_heads, head_dim].
        """
        self._write(kv, keys, values)
        results = [self._attend(each, kv, queries, keys, values) for each in self._gathers]
        return results[0] if len(results) == 1 else torch.cat(results)

    def _write(self, kv: PagedKv, keys: Tensor, values: Tensor) -> None:
        writes = self._writes
        if writes.fresh is not None:
            kv.halves.index_fill_(0, writes.fresh, 0.0)
        kv.tokens.index_copy_(0, writes.keys, keys.flatten(1))
        kv.tokens.index_copy_(0, writes.values, values.flatten(1))

    def _attend(
        self, gather: _Gather, kv: PagedKv, queries: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        queries = queries[gather.tokens]
        if gather.halves is None:
            k, v = keys[gather.tokens].unsqueeze(0), values[gather.tokens].unsqueeze(0)
        else:
            found = self._workspace.rows(len(gather.halves), kv.halves.shape[1])
            torch.index_select(kv.halves, 0, gather.halves, out=found)
            shape = (2, gather.rows or 1, -1, kv.kv_heads, kv.head_dim)
            k, v = found.view(shape)[:, :, : gather.context]
        # [rows, heads, tokens, head_dim]: decode rows are a batch, a prefill row is one of many
        # tokens.
        q = queries.unsqueeze(2) if gather.rows else queries.transpose(0, 1).unsqueeze(0)
        attended = functional.scaled_dot_product_attention(
            q,
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=gather.mask,
            is_causal=gather.mask is None,
            enable_gqa=True,
        )
        return attended.transpose(1, 2).reshape(len(queries), -1)


def order_spans(spans: Sequence[Span]) -> list[int]:
    """The order of rows that plans expect: decode rows first, longest context first."""
    return sorted(
        range(len(spans)),
        key=lambda i: (spans[i].num_tokens > 1, -spans[i].start if spans[i].num_tokens == 1 else i),
    )


class Planner:
    """Makes the plans of an iteration from the lanes' block tables."""

    def __init__(self, kv: PagedKv, tables: Tensor, dtype: torch.dtype) -> None:
        self._kv = kv
        self._tables = tables
        self._dtype = dtype
        self._device = tables.device
        self._workspace = Workspace(dtype, tables.device)

    def plan(
        self,
        spans: Sequence[Span],
        lanes: Tensor,
        positions: Tensor,
        windows: Sequence[int | None],
    ) -> dict[int | None, AttentionPlan]:
        """One plan for each window.

        Args:
            spans: in the order of `order_spans`.
            lanes, positions: [n] int64 of the fed tokens.
        """
        writes = self._writes(spans, lanes, positions)
        return {
            window: AttentionPlan(writes, list(self._gathers(spans, window)), self._workspace)
            for window in dict.fromkeys(windows)
        }

    def _writes(self, spans: Sequence[Span], lanes: Tensor, positions: Tensor) -> _Writes:
        size = self._kv.block_tokens
        slots = self._tables[lanes, positions // size]
        keys = slots * (2 * size) + positions % size
        fresh = [
            (span.lane, (span.end - 1) // size)
            for span in spans
            if span.end % size and (span.end - 1) // size * size >= span.start
        ]
        if not fresh:
            return _Writes(keys, keys + size, None)
        lane, block = torch.tensor(fresh, device=self._device).unbind(1)
        first = self._tables[lane, block] * 2
        return _Writes(keys, keys + size, torch.cat((first, first + 1)))

    def _gathers(self, spans: Sequence[Span], window: int | None) -> Iterator[_Gather]:
        num_decode = sum(span.num_tokens == 1 for span in spans)
        for first, last in self._batches(spans[:num_decode], window):
            yield self._decode(spans[first:last], first, window)
        first = num_decode
        for span in spans[num_decode:]:
            yield self._prefill(span, first, window)
            first += span.num_tokens

    def _batches(self, spans: Sequence[Span], window: int | None) -> Iterator[tuple[int, int]]:
        """Cut rows, longest first, where more than half of the rest would be padding."""
        first = 0
        blocks = [self._num_blocks(span, window) for span in spans]
        for last, count in enumerate(blocks):
            saved = (blocks[first] - count) * (len(spans) - last) * self._kv.block_bytes
            if count * 2 <= blocks[first] and saved > _SPLIT_BYTES:
                yield first, last
                first = last
        if spans:
            yield first, len(spans)

    def _first_block(self, span: Span, window: int | None) -> int:
        """The first block that the first fed token sees."""
        return 0 if window is None else max(span.start + 1 - window, 0) // self._kv.block_tokens

    def _num_blocks(self, span: Span, window: int | None) -> int:
        return -(-span.end // self._kv.block_tokens) - self._first_block(span, window)

    def _decode(self, spans: Sequence[Span], first_row: int, window: int | None) -> _Gather:
        numbers = [
            (span.lane, span.start, self._first_block(span, window), self._num_blocks(span, window))
            for span in spans
        ]
        size, device = self._kv.block_tokens, self._device
        lanes, starts, first, counts = torch.tensor(numbers, device=device).unsqueeze(2).unbind(1)
        most = max(number[3] for number in numbers)
        columns = torch.arange(most, device=device)
        columns = first + torch.where(columns < counts, columns, 0)
        slots = self._tables[lanes, columns]
        positions = first * size + torch.arange(most * size, device=device)
        is_hidden = positions > starts
        if window is not None:
            is_hidden |= positions <= starts - window
        return _Gather(
            tokens=slice(first_row, first_row + len(spans)),
            halves=torch.cat((slots * 2, slots * 2 + 1)).flatten(),
            rows=len(spans),
            context=most * size,
            mask=self._mask(is_hidden)[:, None, None],
        )

    def _prefill(self, span: Span, first_token: int, window: int | None) -> _Gather:
        tokens = slice(first_token, first_token + span.num_tokens)
        if span.start == 0 and (window is None or span.end <= window):
            return _Gather(tokens, None, 0, span.num_tokens, None)
        size, device = self._kv.block_tokens, self._device
        first = self._first_block(span, window)
        slots = self._tables[span.lane, first : first + self._num_blocks(span, window)]
        seen = torch.arange(first * size, span.end, device=device)
        positions = torch.arange(span.start, span.end, device=device).unsqueeze(1)
        is_hidden = seen > positions
        if window is not None:
            is_hidden |= seen <= positions - window
        halves = torch.cat((slots * 2, slots * 2 + 1))
        return _Gather(tokens, halves, 0, span.end - first * size, self._mask(is_hidden))

    def _mask(self, is_hidden: Tensor) -> Tensor:
        mask = torch.zeros(is_hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(is_hidden, -torch.inf)
