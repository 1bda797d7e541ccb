"""Plans an iteration's attention from the lanes' block tables, once for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import torch
from torch import Tensor

from pie_async.model.attention import (
    AttentionPlan,
    DecodeBatch,
    PagedKv,
    PrefillRow,
    Workspace,
    Writes,
)
from pie_async.model.transfer import upload

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


def order_spans(spans: Sequence[Span]) -> list[int]:
    """The order of rows that plans expect: decode rows first, longest context first."""

    def place(i: int) -> tuple[bool, int]:
        is_prefill = spans[i].num_tokens > 1
        return is_prefill, 0 if is_prefill else -spans[i].start

    return sorted(range(len(spans)), key=place)


class Planner:
    """Makes the plans of an iteration.

    Args:
        kv: any layer's.
        tables: [lanes, max_blocks] int64, slots; read when a plan is made. Entries beyond a
            row's context are never used.
    """

    def __init__(self, kv: PagedKv, tables: Tensor, dtype: torch.dtype) -> None:
        self._kv = kv
        self._tables = tables
        self._dtype = dtype
        self._device = tables.device
        self._workspace = Workspace(dtype, tables.device)
        self._numbers = torch.arange(kv.kv_heads, device=tables.device)

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
            window: AttentionPlan(writes, list(self._parts(spans, window)), self._workspace)
            for window in dict.fromkeys(windows)
        }

    def _writes(self, spans: Sequence[Span], lanes: Tensor, positions: Tensor) -> Writes:
        size = self._kv.block_tokens
        slots = self._tables[lanes, positions // size]
        first = (slots * (2 * self._kv.kv_heads * size) + positions % size).unsqueeze(1)
        keys = (first + self._numbers * size).flatten()
        values = keys + self._kv.kv_heads * size
        fresh = [
            (span.lane, (span.end - 1) // size)
            for span in spans
            if span.end % size and (span.end - 1) // size * size >= span.start
        ]
        if not fresh:
            return Writes(keys, values, None)
        lane, block = upload(fresh, self._device).unbind(1)
        return Writes(keys, values, self._tables[lane, block])

    def _parts(
        self, spans: Sequence[Span], window: int | None
    ) -> Iterator[DecodeBatch | PrefillRow]:
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

    def _decode(self, spans: Sequence[Span], first_row: int, window: int | None) -> DecodeBatch:
        numbers = [
            (span.lane, span.start, self._first_block(span, window), self._num_blocks(span, window))
            for span in spans
        ]
        size, device = self._kv.block_tokens, self._device
        lanes, starts, first, counts = upload(numbers, device).unsqueeze(2).unbind(1)
        most = max(number[3] for number in numbers)
        columns = torch.arange(most, device=device)
        slots = self._tables[lanes, first + torch.where(columns < counts, columns, 0)]
        seen = torch.arange(most * size, device=device)
        positions = first * size + seen
        is_hidden = positions > starts
        if window is not None:
            is_hidden |= positions <= starts - window
        return DecodeBatch(
            tokens=slice(first_row, first_row + len(spans)),
            heads=self._heads(slots),
            mask=self._mask(is_hidden).unsqueeze(1),
        )

    def _heads(self, slots: Tensor) -> Tensor:
        """Of [rows, blocks] slots: [2, rows, kv_heads, blocks], flat, rows of `PagedKv.heads`."""
        heads = self._kv.kv_heads
        keys = slots.unsqueeze(1) * (2 * heads) + self._numbers.unsqueeze(1)
        return torch.cat((keys, keys + heads)).flatten()

    def _prefill(self, span: Span, first_token: int, window: int | None) -> PrefillRow:
        tokens = slice(first_token, first_token + span.num_tokens)
        if span.start == 0 and (window is None or span.end <= window):
            return PrefillRow(tokens, None, span.num_tokens, None)
        size, device = self._kv.block_tokens, self._device
        first = self._first_block(span, window)
        last = first + self._num_blocks(span, window)
        slots = self._tables[span.lane : span.lane + 1, first:last]
        seen = torch.arange(first * size, span.end, device=device)
        positions = torch.arange(span.start, span.end, device=device).unsqueeze(1)
        is_hidden = seen > positions
        if window is not None:
            is_hidden |= seen <= positions - window
        mask = self._mask(is_hidden)
        return PrefillRow(tokens, self._heads(slots), span.end - first * size, mask)

    def _mask(self, is_hidden: Tensor) -> Tensor:
        mask = torch.zeros(is_hidden.shape, dtype=self._dtype, device=self._device)
        return mask.masked_fill_(is_hidden, -torch.inf)
