"""Runs a decoder over paged KV for the rows of an iteration."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from pie_async.messages import Row, RunIteration, SampledToken, TableUpdate
from pie_async.model.attention import AttentionPlan, PagedKv
from pie_async.model.attention_plan import Planner, Span, order_spans
from pie_async.model.decoder import Decoder
from pie_async.model.lanes import Lanes, Results
from pie_async.model.transfer import upload


class ModelPass(Results):
    """One iteration on its way through the layers; its rows are in the order of `order_spans`."""

    def __init__(self, rows: Sequence[Row], plans: dict[int | None, AttentionPlan]) -> None:
        super().__init__(rows)
        self.plans = plans
        self.hidden: Tensor
        self.rotation: tuple[Tensor, Tensor] | None = None


class ModelRunner:
    """Keeps, per lane, block table and last sampled token; turns iterations into tokens.

    All methods are called from one thread, for one iteration after the other.

    Args:
        decoder: the model, its parameters filled.
        kv: per layer, [slots, 2, kv_heads, block_tokens, head_dim], contiguous, the decoder's
            dtype. What a slot holds before a row writes to it does not matter.
        lanes: rows of the persistent tables.
        max_blocks: longest block table.
        block_tokens: as in `kv`.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: Sequence[Tensor],
        *,
        lanes: int,
        max_blocks: int,
        block_tokens: int,
    ) -> None:
        assert len(kv) == decoder.config.num_layers
        assert kv[0].shape[3] == block_tokens
        device = decoder.device
        self._decoder = decoder
        self._device = device
        self._kv = [PagedKv(layer) for layer in kv]
        self._max_blocks = max_blocks
        self._tables = torch.zeros(lanes, max_blocks, dtype=torch.int64, device=device)
        self._last_tokens = torch.zeros(lanes, dtype=torch.int64, device=device)
        self._planner = Planner(self._kv[0], self._tables, decoder.dtype)
        self._lanes = Lanes(lanes, decoder.config.vocab_size, device, decoder.logits)

    def use_masks(self, masks: Tensor) -> None:
        """Where the masks of guided sequences lie; see `LaneSampler.use_masks`."""
        self._lanes.sampler.use_masks(masks)

    @torch.inference_mode()
    def begin(self, command: RunIteration) -> ModelPass:
        """Apply bindings and block tables, plan attention, embed the fed tokens."""
        self._lanes.bind(command.bindings)
        self._lanes.take_masks(command.rows)
        self._update_tables(command.tables)
        spans = [Span(row.lane, row.start, row.num_tokens) for row in command.rows]
        order = order_spans(spans)
        rows = [command.rows[i] for i in order]
        spans = [spans[i] for i in order]
        lanes, positions, tokens = self._fed(rows)
        plans = self._planner.plan(spans, lanes, positions, self._decoder.config.windows)
        forward = ModelPass(rows, plans)
        forward.hidden = self._decoder.embed(tokens, positions)
        forward.rotation = self._rotation(rows, positions)
        if self._lanes.counts_tokens:
            self._lanes.sampler.observe(lanes, tokens)
        return forward

    @torch.inference_mode()
    def run_layers(self, forward: ModelPass, layers: range) -> None:
        """Run these layers: write the fed tokens' KV, attend over the tables' slots."""
        for layer in layers if forward.rows else ():
            attention = _BoundAttention(
                forward.plans[self._decoder.config.windows[layer]], self._kv[layer]
            )
            forward.hidden = self._decoder.run_layer(
                layer, forward.hidden, forward.rotation, attention
            )

    @torch.inference_mode()
    def sample(self, forward: ModelPass) -> None:
        """Sample every row that asks for it; score prompts where asked for.

        Never waits for the device; `ModelPass.collect` reads the outcome.
        """
        ends = _ends(forward.rows)
        sampled = [i for i, row in enumerate(forward.rows) if row.is_sampled]
        if sampled:
            last = upload([ends[i] - 1 for i in sampled], self._device)
            rows = [forward.rows[i] for i in sampled]
            forward.reports = self._sample(rows, forward.hidden[last])
        forward.scores = list(self._lanes.scores(forward.rows, forward.hidden))

    def _update_tables(self, updates: Iterable[TableUpdate]) -> None:
        # A dict, so that of two updates to one entry the later one counts.
        entries = {
            update.lane * self._max_blocks + update.first + i: int(slot)
            for update in updates
            for i, slot in enumerate(update.slots)
        }
        if entries:
            where, slots = upload((list(entries), list(entries.values())), self._device)
            self._tables.view(-1).index_copy_(0, where, slots)

    def _fed(self, rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
        """[n] lanes, positions and token ids of the fed tokens, all int64."""
        lanes: list[int] = []
        positions: list[int] = []
        tokens: list[int] = []
        for row in rows:
            count = row.num_tokens
            lanes += [row.lane] * count
            positions += range(row.start, row.start + count)
            tokens += row.tokens or (-1,)
        fed = upload((lanes, positions, tokens), self._device, torch.int64)
        lane, position, token = fed.unbind(0)
        if any(not row.tokens for row in rows):
            token = torch.where(token < 0, self._last_tokens[lane], token)
        return lane, position, token

    def _rotation(self, rows: Sequence[Row], positions: Tensor) -> tuple[Tensor, Tensor] | None:
        rotary = self._decoder.rotary
        if rotary is None:
            return None
        if not rotary.needs_lengths:
            return rotary.factors(positions)
        prompts = [
            self._lanes.bindings[row.lane].prompt_len for row in rows for _ in range(row.num_tokens)
        ]
        lengths = torch.maximum(positions + 1, upload(prompts, self._device))
        return rotary.factors(positions, lengths)

    def _sample(self, rows: Sequence[Row], hidden: Tensor) -> Iterator[SampledToken]:
        numbers = [(row.lane, row.start + row.num_tokens) for row in rows]
        lanes, positions = upload(numbers, self._device).unbind(1)
        logits = self._decoder.logits(hidden)
        chosen = self._lanes.sampler.sample(logits, lanes, positions, self._lanes.needs(rows))
        self._last_tokens[lanes] = chosen.tokens
        return self._lanes.report(rows, chosen)


class _BoundAttention:
    """`LayerAttention` of one layer in one iteration."""

    def __init__(self, plan: AttentionPlan, kv: PagedKv) -> None:
        self._plan = plan
        self._kv = kv

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return self._plan.attend(self._kv, queries, keys, values)


def _ends(rows: Sequence[Row]) -> list[int]:
    """Where each row's fed tokens end."""
    ends, end = [], 0
    for row in rows:
        end += row.num_tokens
        ends.append(end)
    return ends
