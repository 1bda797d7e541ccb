"""Which attention kernel handles which tokens of an iteration."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from pie_async.cuda.flashinfer_attention import (
    FlashInferAttention,
    FlashInferPlan,
    Heads,
    one_line,
    pays,
)
from pie_async.cuda.kernels.decode_attention import DecodeWorkspace, decode_attention, plan_decode
from pie_async.cuda.kernels.prefill_attention import (
    prefill_attention,
    prefill_config,
    prefill_tiles,
)
from pie_async.messages import Row
from pie_async.model.config import ModelConfig

_log = logging.getLogger(__name__)

_INTERPRETED_PROGRAMS = 3
"""Without a GPU, where Triton interprets the kernels for the tests."""


class PagedAttention:
    """Attention over the layers' paged KV, for one runner.

    Args:
        kv: per layer, [slots, 2, kv_heads, block_tokens, head_dim].
        tables: [lanes + 1, max_blocks] int32 slots.
        uses_flashinfer: for rows of several tokens in layers without a window.
    """

    def __init__(
        self,
        config: ModelConfig,
        kv: Sequence[Tensor],
        tables: Tensor,
        *,
        max_rows: int,
        uses_flashinfer: bool = False,
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
        self._flashinfer: FlashInferAttention | None = None
        if uses_flashinfer:
            heads = Heads(
                config.num_heads, config.kv_heads, config.head_dim, kv[0].shape[3], kv[0].dtype
            )
            self._flashinfer = FlashInferAttention(heads, tables.device)

    def tiles(self, rows: Iterable[Row], first_token: int) -> Tensor:
        """[num_tiles, 4] int32 on the host for rows whose tokens follow each other."""
        chunks = []
        for row in rows:
            chunks.append((int(row.lane), first_token, row.num_tokens, row.start))
            first_token += row.num_tokens
        return prefill_tiles(
            chunks, heads=self._heads, kv_heads=self._kv_heads, config=self._prefill
        )

    def most_tiles(self, num_tokens: int, num_rows: int) -> int:
        """That so many tokens of so many rows are cut into."""
        step = self._prefill.tile_rows // (self._heads // self._kv_heads)
        return num_tokens // step + num_rows

    def plan_decode(self, positions: Tensor, lanes: Tensor) -> dict[int | None, Tensor]:
        """By window; once for all layers."""
        return {
            window: plan_decode(positions, lanes, window=window, workspace=self._workspace)
            for window in dict.fromkeys(self.windows)
        }

    def plan_flashinfer(self, rows: Sequence[Row]) -> FlashInferPlan | None:
        """For rows of several tokens whose tokens follow each other, from the tables as they are
        on the current stream. None: Triton's tiles are to be used."""
        if self._flashinfer is None:
            return None
        chunks = [(row.lane, row.num_tokens, row.start) for row in rows]
        if not pays(chunks):
            return None
        try:
            return self._flashinfer.plan(chunks, self._tables)
        except Exception as error:  # whatever a library raises, there is another kernel
            self._flashinfer = None
            _log.warning("attention of prompts: Triton from now on: %s", one_line(error))
            return None

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

    def prefill(
        self,
        layer: int,
        queries: Tensor,
        tiles: Tensor,
        out: Tensor,
        plan: FlashInferPlan | None,
        first_token: int,
    ) -> None:
        """Rows of several tokens.

        Args:
            plan: of the rows of these tiles.
            first_token: of the first row.
        """
        kv, window = self._kv[layer], self.windows[layer]
        if plan is not None and window is None:
            tokens = slice(first_token, first_token + plan.num_tokens)
            plan.run(queries[tokens], kv, out[tokens])
            return
        prefill_attention(
            queries, kv, self._tables, tiles, window=window, out=out, config=self._prefill
        )


class StepAttention:
    """`Step` of `fused_decoder.py`: what the layers of one iteration share.

    Args:
        decode_tokens: leading tokens that are rows of their own, padding included.
        tiles: of the other tokens, on the device; None: there are no others.
        chunks: the rows of these tiles, where FlashInfer may serve them.
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
        chunks: Sequence[Row] = (),
    ) -> None:
        self.positions = positions
        self.places = places
        self.rotation = rotation
        self._attention = attention
        self._decode_tokens = decode_tokens
        self._lanes = lanes[:decode_tokens]
        self._decode_positions = positions[:decode_tokens]
        self._tiles = tiles
        self._flashinfer = attention.plan_flashinfer(chunks)
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
            self._attention.prefill(layer, queries, self._tiles, out, self._flashinfer, count)
        return out
