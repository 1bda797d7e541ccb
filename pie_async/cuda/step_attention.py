"""Which attention kernel handles which tokens of an iteration."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pie_async.cuda.kernels.decode_attention import DecodeWorkspace, decode_attention, plan_decode
from pie_async.cuda.kernels.prefill_attention import (
    prefill_attention,
    prefill_config,
    prefill_tiles,
)
from pie_async.messages import Row
from pie_async.model.config import ModelConfig

_INTERPRETED_PROGRAMS = 3
"""Without a GPU, where Triton interprets the kernels for the tests."""


class PagedAttention:
    """Attention over the layers' paged KV, for one runner.

    Args:
        kv: per layer, [slots, 2, kv_heads, block_tokens, head_dim].
        tables: [lanes + 1, max_blocks] int32 slots.
    """

    def __init__(
        self, config: ModelConfig, kv: Sequence[Tensor], tables: Tensor, *, max_rows: int
    ) -> None:
        self.windows = config.windows
        self._kv = kv
        self._tables = tables
        self._heads, self._kv_heads = config.num_heads, config.kv_heads
        self._workspace = DecodeWorkspace(
            max_rows=max_rows,
            heads=config.num_heads,
            kv_heads=config.kv_heads,
            head_dim=config.head_dim,
            block_tokens=kv[0].shape[3],
            dtype=kv[0].dtype,
            device=tables.device,
            num_programs=None if tables.is_cuda else _INTERPRETED_PROGRAMS,
        )
        self._prefill = prefill_config(
            config.num_heads, config.kv_heads, config.head_dim, kv[0].dtype
        )

    def tiles(self, rows: Iterable[Row], first_token: int) -> Tensor:
        """[num_tiles, 4] int32 on the host for rows whose tokens follow each other."""
        chunks = []
        for row in rows:
            chunks.append((int(row.lane), first_token, row.num_tokens, row.start))
            first_token += row.num_tokens
        return prefill_tiles(
            chunks, heads=self._heads, kv_heads=self._kv_heads, config=self._prefill
        )

    def plan_decode(self, positions: Tensor, lanes: Tensor) -> dict[int | None, Tensor]:
        """By window; once for all layers."""
        return {
            window: plan_decode(positions, lanes, window=window, workspace=self._workspace)
            for window in dict.fromkeys(self.windows)
        }

    def decode(
        self,
        layer: int,
        queries: Tensor,
        lanes: Tensor,
        positions: Tensor,
        plans: dict[int | None, Tensor],
        out: Tensor,
    ) -> None:
        """Rows of one token each."""
        window = self.windows[layer]
        decode_attention(
            queries,
            self._kv[layer],
            self._tables,
            lanes,
            positions,
            window=window,
            out=out,
            workspace=self._workspace,
            plan=plans[window],
        )

    def prefill(self, layer: int, queries: Tensor, tiles: Tensor, out: Tensor) -> None:
        """Rows of several tokens."""
        prefill_attention(
            queries,
            self._kv[layer],
            self._tables,
            tiles,
            window=self.windows[layer],
            out=out,
            config=self._prefill,
        )


class StepAttention:
    """`Step` of `fused_decoder.py`: what the layers of one iteration share.

    Args:
        decode_tokens: leading tokens that are rows of their own, padding included.
        tiles: of the other tokens, on the device; None: there are no others.
    """

    def __init__(
        self,
        attention: PagedAttention,
        *,
        positions: Tensor,
        lanes: Tensor,
        places: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        decode_tokens: int,
        tiles: Tensor | None,
    ) -> None:
        self.positions = positions
        self.places = places
        self.rotation = rotation
        self._attention = attention
        self._decode_tokens = decode_tokens
        self._lanes = lanes[:decode_tokens]
        self._decode_positions = positions[:decode_tokens]
        self._tiles = tiles
        self._plans = (
            attention.plan_decode(self._decode_positions, self._lanes) if decode_tokens else {}
        )

    def attend(self, layer: int, queries: Tensor) -> Tensor:
        n, heads, dim = queries.shape
        # Tokens in no tile are padding: nobody reads what they attend to.
        out = torch.empty(n, heads * dim, dtype=queries.dtype, device=queries.device)
        count = self._decode_tokens
        if count:
            self._attention.decode(
                layer,
                queries[:count],
                self._lanes,
                self._decode_positions,
                self._plans,
                out[:count],
            )
        if self._tiles is not None:
            self._attention.prefill(layer, queries, self._tiles, out)
        return out
