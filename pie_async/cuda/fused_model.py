"""What iterations share on the GPU, and the parts that each of them is made of."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor

from pie_async.core.batch_shapes import SPARE_ROWS
from pie_async.core.layout import KvLayout
from pie_async.cuda.fused_decoder import FusedDecoder, Hidden, Product
from pie_async.cuda.kernels.inputs import apply_updates, remember, resolve
from pie_async.cuda.kernels.sampling import choose
from pie_async.cuda.step_attention import PagedAttention, StepAttention
from pie_async.cuda.step_inputs import FedTokens, Updates, Uploader
from pie_async.messages import LaneBinding, Row
from pie_async.model.decoder import Decoder
from pie_async.model.lanes import Lanes
from pie_async.model.sampling import Needs, Sampled, TokenLogprobs
from pie_async.model.transfer import upload

GREEDY = Needs()
DRAWN = Needs(draws=True)
PAD_TOKENS = 8
"""Tokens of an iteration without a graph are padded to a multiple: cuBLAS likes it."""
_MOST_UPDATES = 1 << 16
"""Block-table updates of one copy: with room for all entries of all lanes, four pinned buffers
for 256 lanes of a million tokens would take a gigabyte."""
_ROWS_AT_ONCE = 64
"""Rows that truncation, penalties and logprobs work on together: each takes some 90 bytes of work
space per token of the vocabulary, 740 MB for 64 rows of 128256."""


class FusedModel:
    """A model over paged KV: block tables, last tokens and sampling state of its lanes.

    Attributes:
        padding_lane: a row of the tables that no sequence has.
        most_updates: of the block tables, that can come with an iteration.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: Sequence[Tensor],
        layout: KvLayout,
        *,
        lanes: int,
        max_blocks: int,
        max_tokens: int,
        product: Product,
        uses_flashinfer: bool = False,
    ) -> None:
        device, config = decoder.device, decoder.config
        self.device = device
        self.layout = layout
        self.max_blocks = max_blocks
        self.padding_lane = lanes
        self._rotary = decoder.rotary
        self._fused = FusedDecoder(decoder, list(kv), product)
        self._tables = torch.zeros(lanes + 1, max_blocks, dtype=torch.int32, device=device)
        self._last_tokens = torch.zeros(lanes + 1, dtype=torch.int64, device=device)
        self._prompt_lens = torch.zeros(lanes + 1, dtype=torch.int64, device=device)
        self.attention = PagedAttention(
            config, kv, self._tables, max_rows=lanes, uses_flashinfer=uses_flashinfer
        )
        self.lanes = Lanes(lanes + 1, config.vocab_size, device, self._float_logits)
        self.most_updates = min(lanes * max_blocks, _MOST_UPDATES)
        # Padded as graphs pad them: rows of one token beside as many of prompts as fit, a table
        # update for each, a few rows of prompts more.
        tokens, rows = lanes + max_tokens + PAD_TOKENS, lanes + SPARE_ROWS
        updates = 2 * (self.most_updates + tokens)
        tiles = 4 * (max_tokens + rows)
        self._uploader = Uploader(3 * tokens + updates + 3 * rows + tiles, device)

    def bind(self, bindings: Sequence[LaneBinding]) -> None:
        """Sequences take over lanes."""
        self.lanes.bind(bindings)
        if bindings and self._rotary is not None and self._rotary.needs_lengths:
            lanes, lengths = zip(*((each.lane, each.prompt_len) for each in bindings), strict=True)
            self._prompt_lens[upload(lanes, self.device)] = upload(lengths, self.device)

    def fed_tokens(
        self, num_tokens: int, num_updates: int, *, prompts_at: int | None = None
    ) -> FedTokens:
        """Where that many tokens and updates lie once they are uploaded."""
        return FedTokens(self._uploader.device_buffer, num_tokens, num_updates, prompts_at)

    def more_numbers(self, fed: FedTokens, count: int) -> Tensor:
        """Where that many numbers lie that are uploaded with them."""
        return self._uploader.device_buffer[fed.size : fed.size + count]

    def upload(
        self, fed: FedTokens, rows: Sequence[Row], updates: Updates, more: Tensor | None = None
    ) -> Tensor:
        """Bring an iteration's numbers to the device.

        Args:
            fed: large enough for rows and updates; the rest of it becomes padding.
            more: [m] int32 on the host, to go with them.

        Returns:
            `more` on the device.
        """
        array = self._uploader.array()
        fed.fill(array, rows, updates, padding_lane=self.padding_lane)
        size = fed.size
        if more is not None:
            size += len(more)
            array[fed.size : size] = more.numpy()
        self._uploader.upload(size)
        return self.more_numbers(fed, size - fed.size)

    def make_room(self, updates: Updates, most: int) -> Updates:
        """These updates, or, if there are more than `most`, none: then they are made now."""
        if len(updates) <= most:
            return updates
        rest = iter(updates.items())
        while some := dict(islice(rest, self.most_updates)):
            fed = self.fed_tokens(0, len(some))
            self.upload(fed, (), some)
            apply_updates(self._tables, fed.updates)
        return {}

    def embed(
        self,
        fed: FedTokens,
        *,
        decode_tokens: int,
        tiles: Tensor | None,
        chunks: Sequence[Row] = (),
    ) -> tuple[StepAttention, Hidden]:
        """Everything before the first layer, from numbers that are uploaded.

        Args:
            decode_tokens, tiles, chunks: see `StepAttention`.
        """
        apply_updates(self._tables, fed.updates)
        token_ids, places = resolve(
            fed.tokens,
            fed.lanes,
            fed.positions,
            self._last_tokens,
            self._tables,
            self.layout.block_tokens,
        )
        step = StepAttention(
            self.attention,
            positions=fed.positions,
            lanes=fed.lanes,
            places=places,
            rotation=self._rotation(fed),
            decode_tokens=decode_tokens,
            tiles=tiles,
            chunks=chunks,
        )
        return step, self._fused.embed(token_ids, fed.positions)

    def run_layers(self, layers: range, hidden: Hidden, step: StepAttention) -> None:
        """See `FusedDecoder.run_layers`."""
        self._fused.run_layers(layers, hidden, step)

    def head_input(self, hidden: Hidden) -> Tensor:
        """See `FusedDecoder.head_input`."""
        return self._fused.head_input(hidden)

    def choose(self, head_input: Tensor, lanes: Tensor, positions: Tensor, needs: Needs) -> Sampled:
        """Sample, and feed tokens back.

        Args:
            head_input: [n, width], left as it is.
            lanes: [n] int32, contiguous.
            positions: [n] integers, of the tokens being sampled.
        """
        logits = self._fused.logits(head_input)
        if takes_one_kernel(needs):
            chosen = Sampled(self._choose(logits, lanes, positions, needs), None)
        else:
            chosen = self._sample(logits, lanes.long(), positions.long(), needs)
        remember(self._last_tokens, lanes, chosen.tokens)
        return chosen

    def _choose(self, logits: Tensor, lanes: Tensor, positions: Tensor, needs: Needs) -> Tensor:
        """Where `takes_one_kernel`."""
        if needs == GREEDY:
            return choose(logits, temperature=None)
        sampler, lanes = self.lanes.sampler, lanes.long()
        masks, slots = sampler.mask_inputs(lanes) if needs.masks else (None, None)
        temperature, keys = sampler.draw_inputs(lanes) if needs.draws else (None, None)
        return choose(
            logits,
            temperature=temperature,
            keys=keys,
            positions=positions,
            codes=sampler.codes,
            masks=masks,
            slots=slots,
        )

    def _sample(self, logits: Tensor, lanes: Tensor, positions: Tensor, needs: Needs) -> Sampled:
        sample = self.lanes.sampler.sample
        parts = [slice(i, i + _ROWS_AT_ONCE) for i in range(0, len(lanes), _ROWS_AT_ONCE)]
        return _joined([sample(logits[p].float(), lanes[p], positions[p], needs) for p in parts])

    def _rotation(self, fed: FedTokens) -> tuple[Tensor, Tensor] | None:
        if self._rotary is None:
            return None
        positions = fed.positions.long()
        if not self._rotary.needs_lengths:
            return self._rotary.factors(positions)
        lengths = torch.maximum(positions + 1, self._prompt_lens[fed.lanes.long()])
        return self._rotary.factors(positions, lengths)

    def _float_logits(self, hidden: Tensor) -> Tensor:
        return self._fused.logits(self._fused.head_input(Hidden(hidden))).float()


def takes_one_kernel(needs: Needs) -> bool:
    """Whether sampling is an argmax: with noise or without, under masks or without."""
    return needs._replace(masks=False) in (GREEDY, DRAWN)


def _joined(parts: Sequence[Sampled]) -> Sampled:
    """What was sampled in several parts, as if it had been in one."""
    if len(parts) == 1:
        return parts[0]
    tokens = torch.cat([part.tokens for part in parts])
    logprobs = [part.logprobs for part in parts if part.logprobs is not None]
    if not logprobs:
        return Sampled(tokens, None)
    return Sampled(tokens, TokenLogprobs(*map(torch.cat, zip(*logprobs, strict=True))))
