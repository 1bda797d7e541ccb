"""Runs a decoder over paged KV with fused kernels and CUDA graphs.

Iterations of one-token rows are padded to a bucket and replayed: the numbers come in one copy,
the tokens of the last iteration are already on the GPU, and sampling is part of the graph.
Everything else (prompts, scores, penalties) runs the same kernels one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from pie_async.core.layout import KvLayout
from pie_async.cuda.decode_program import DecodeProgram, graphable, most_updates
from pie_async.cuda.fused_decoder import Product
from pie_async.cuda.fused_model import GREEDY, PAD_TOKENS, FusedModel
from pie_async.cuda.graphs import bucket_of, buckets
from pie_async.cuda.step_inputs import Updates, flat_updates
from pie_async.cuda.tuning import product
from pie_async.messages import Row, RunIteration
from pie_async.model.decoder import Decoder
from pie_async.model.lanes import Results
from pie_async.model.sampling import Needs, Sampled, TokenLogprobs
from pie_async.model.transfer import upload

_WARM_UP_TOKENS = 64


class FusedRunner:
    """What `CudaDevice` asks of a runner; `model/runner.py` is the reference.

    Args:
        decoder: on the GPU, its parameters filled.
        kv: per layer, [slots, 2, kv_heads, block_tokens, head_dim], contiguous.
        layout: of this KV; its layer groups are captured one by one.
        lanes: most sequences that run together.
        max_blocks: longest block table.
        max_tokens: most tokens of an iteration.
        product: of the linear layers.
        uses_graphs: without them every kernel is launched from Python.
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
        product: Product = product,
        uses_graphs: bool = True,
    ) -> None:
        self._model = FusedModel(
            decoder,
            kv,
            layout,
            lanes=lanes,
            max_blocks=max_blocks,
            max_tokens=max_tokens,
            product=product,
        )
        self._largest = lanes if uses_graphs else 0
        self._pool = torch.cuda.graph_pool_handle() if uses_graphs else None
        self._programs: dict[tuple[int, Needs | None, bool], DecodeProgram] = {}

    @torch.inference_mode()
    def begin(self, command: RunIteration) -> FusedPass:
        """Apply bindings and block tables, embed the fed tokens."""
        model = self._model
        model.bind(command.bindings)
        updates = flat_updates(command.tables, model.max_blocks)
        rows = sorted(command.rows, key=lambda row: row.num_tokens > 1)  # decode rows first
        needs = model.lanes.needs(row for row in rows if row.is_sampled)
        bucket = self._bucket(rows, updates)
        if bucket is None:
            return LaunchedPass(model, rows, needs, updates)
        program = self._program(bucket, graphable(needs), is_staged=command.is_staged)
        return ReplayedPass(model, rows, needs, updates, program)

    @torch.inference_mode()
    def run_layers(self, forward: FusedPass, layers: range) -> None:
        """Run these layers: write the fed tokens' KV, attend over the tables' slots."""
        forward.run_layers(layers)

    @torch.inference_mode()
    def sample(self, forward: FusedPass) -> None:
        """Sample every row that asks for it; score prompts where asked for."""
        forward.sample()

    @property
    def graph_bytes(self) -> int:
        """What the graphs captured so far take."""
        return sum(program.graph_bytes for program in self._programs.values())

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernels and capture the graphs of greedy decoding, largest first."""
        self._run_padding(_WARM_UP_TOKENS)
        for bucket in reversed(buckets(self._largest)) if self._largest else ():
            self._program(bucket, GREEDY, is_staged=False)

    def close(self) -> None:
        """Free the graphs now: whenever a collection finds them, somebody else may be capturing."""
        self._programs.clear()

    @torch.inference_mode()
    def profile(self, num_tokens: int) -> int:
        """Bytes that an iteration of so many tokens takes beside weights and KV."""
        self._run_padding(num_tokens)  # kernels and libraries keep what they allocate at first
        torch.cuda.synchronize(self._model.device)
        torch.cuda.reset_peak_memory_stats(self._model.device)
        before = torch.cuda.memory_allocated(self._model.device)
        self._run_padding(num_tokens)
        torch.cuda.synchronize(self._model.device)
        return torch.cuda.max_memory_allocated(self._model.device) - before

    def _run_padding(self, num_tokens: int) -> None:
        """A pass over nothing but padding: touches no KV, takes all the memory."""
        model = self._model
        fed = model.fed_tokens(num_tokens, 0)
        model.upload(fed, (), {})
        tiles = torch.full((1, 4), -1, dtype=torch.int32, device=model.device)
        step, hidden = model.embed(fed, decode_tokens=0, tiles=tiles)
        model.run_layers(range(model.layout.num_layers), hidden, step)
        count = min(num_tokens, model.padding_lane)
        rows = torch.zeros(count, dtype=torch.int32, device=model.device)
        model.choose(hidden.rows(rows), fed.lanes[:count], fed.positions[:count], GREEDY)

    def _bucket(self, rows: Sequence[Row], updates: Updates) -> int | None:
        """The graphs' batch size for these rows; None: they run without one."""
        lanes = self._model.lanes
        if not rows or rows[-1].num_tokens > 1 or lanes.counts_tokens:
            return None
        if any(map(lanes.wants_scores, rows)):
            return None
        bucket = bucket_of(len(rows), self._largest)
        return bucket if bucket is not None and len(updates) <= most_updates(bucket) else None

    def _program(self, bucket: int, needs: Needs | None, *, is_staged: bool) -> DecodeProgram:
        """The captured iteration; captured now, if it is not yet."""
        key = (bucket, needs, is_staged)
        if key not in self._programs:
            self._programs[key] = DecodeProgram(
                self._model, bucket, needs, is_staged=is_staged, pool=self._pool
            )
        return self._programs[key]


class LaunchedPass(Results):
    """An iteration whose kernels are launched one by one."""

    def __init__(
        self, model: FusedModel, rows: Sequence[Row], needs: Needs, updates: Updates
    ) -> None:
        super().__init__(rows)
        self._model = model
        self._needs = needs
        num_tokens = sum(row.num_tokens for row in rows)
        decode_tokens = sum(row.num_tokens == 1 for row in rows)
        self._sampled = [row for row in rows if row.is_sampled]
        last = torch.tensor(list(_last_tokens(rows)), dtype=torch.int32).view(-1, 3).T
        tiles = model.attention.tiles(rows[decode_tokens:], decode_tokens)
        fed = model.fed_tokens(-(-num_tokens // PAD_TOKENS) * PAD_TOKENS, len(updates))
        more = model.upload(fed, rows, updates, torch.cat((last.flatten(), tiles.flatten())))
        self._last = more[: last.numel()].view(3, -1).unbind(0)
        tiles_there = more[last.numel() :].view(-1, 4)
        self._step, self._hidden = model.embed(
            fed, decode_tokens=decode_tokens, tiles=tiles_there if len(tiles) else None
        )

    def run_layers(self, layers: range) -> None:
        if self.rows:
            self._model.run_layers(layers, self._hidden, self._step)

    def sample(self) -> None:
        lanes = self._model.lanes
        if any(map(lanes.wants_scores, self.rows)):
            self.scores = list(lanes.scores(self.rows, self._hidden.sum()))
        if self._sampled:
            rows, sampled_lanes, positions = self._last
            hidden = self._hidden.rows(rows)
            chosen = self._model.choose(hidden, sampled_lanes, positions, self._needs)
            self.reports = lanes.report(self._sampled, chosen)


class ReplayedPass(Results):
    """A decode iteration that replays its graphs."""

    def __init__(
        self,
        model: FusedModel,
        rows: Sequence[Row],
        needs: Needs,
        updates: Updates,
        program: DecodeProgram,
    ) -> None:
        super().__init__(rows)
        self._model = model
        self._needs = needs
        self._program = program
        model.upload(program.fed, rows, updates)
        program.begin()

    def run_layers(self, layers: range) -> None:
        self._program.run_layers(layers)

    def sample(self) -> None:
        chosen = self._program.sample(self._needs)
        which = [i for i, row in enumerate(self.rows) if row.is_sampled]
        if len(which) == len(self.rows):
            chosen = _map(chosen, lambda tensor: tensor[: len(which)])
        else:
            index = upload(which, self._model.device)
            chosen = _map(chosen, lambda tensor: tensor.index_select(0, index))
        if which:
            sampled = [self.rows[i] for i in which]
            self.reports = self._model.lanes.report(sampled, chosen)


FusedPass = LaunchedPass | ReplayedPass


def _map(sampled: Sampled, of: Callable[[Tensor], Tensor]) -> Sampled:
    logprobs = sampled.logprobs
    return Sampled(
        of(sampled.tokens), None if logprobs is None else TokenLogprobs(*map(of, logprobs))
    )


def _last_tokens(rows: Sequence[Row]) -> Iterator[tuple[int, int, int]]:
    """Of each sampled row: where its last fed token is, its lane, the position to sample."""
    end = 0
    for row in rows:
        end += row.num_tokens
        if row.is_sampled:
            yield end - 1, row.lane, row.start + row.num_tokens
