"""Runs a decoder over paged KV with fused kernels and CUDA graphs.

Iterations of one-token rows, and of a few short prompts beside them, are padded and replayed: the
numbers come in one copy, the tokens of the last iteration are already on the GPU, and sampling
is replayed too where it is one kernel. Everything else (long prompts, scores) runs the same
kernels one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from pie_async.core.layout import KvLayout
from pie_async.cuda.decode_program import DecodeProgram
from pie_async.cuda.fused_decoder import Product
from pie_async.cuda.fused_model import DRAWN, GREEDY, PAD_TOKENS, FusedModel
from pie_async.cuda.profiling import largest_iteration, longest_prompt, peak_bytes
from pie_async.cuda.programs import Programs
from pie_async.cuda.step_inputs import Updates, flat_updates, last_tokens
from pie_async.cuda.tuning import product
from pie_async.messages import Row, RunIteration
from pie_async.model.decoder import Decoder
from pie_async.model.lanes import Results
from pie_async.model.sampling import Needs
from pie_async.sampling_params import SamplingParams

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
        streams: iterations may be staged.
        uses_graphs: without them every kernel is launched from Python.
        uses_flashinfer: for attention of prompts; see `attention_choice.py`.
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
        streams: bool = True,
        uses_graphs: bool = True,
        uses_flashinfer: bool = False,
    ) -> None:
        self._model = FusedModel(
            decoder,
            kv,
            layout,
            lanes=lanes,
            max_blocks=max_blocks,
            max_tokens=max_tokens,
            product=product,
            uses_flashinfer=uses_flashinfer,
        )
        self._lanes = lanes
        self.has_room: Callable[[], bool] = lambda: True
        self._longest = longest_prompt(max_blocks, layout.block_tokens)
        self._max_tokens = max_tokens
        self._programs = Programs(
            self._model,
            largest=lanes if uses_graphs else 0,
            max_tokens=max_tokens,
            streams=streams,
            pool=torch.cuda.graph_pool_handle() if uses_graphs else None,
        )

    def use_masks(self, masks: Tensor) -> None:
        """Where the masks of guided sequences lie; see `LaneSampler.use_masks`."""
        self._model.lanes.sampler.use_masks(masks)

    @torch.inference_mode()
    def begin(self, command: RunIteration) -> FusedPass:
        """Apply bindings and block tables, embed the fed tokens."""
        model = self._model
        model.bind(command.bindings)
        model.lanes.take_masks(command.rows)
        updates = flat_updates(command.tables, model.max_blocks)
        rows = _decode_rows_first(command.rows)
        needs = model.lanes.needs(row for row in rows if row.is_sampled)
        program = self._programs.find(rows, needs, is_staged=command.is_staged)
        if program is None:
            return LaunchedPass(model, rows, needs, updates, is_staged=command.is_staged)
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
    def wants_graphs(self) -> bool:
        """Whether an iteration was launched that could have been replayed."""
        return self._programs.are_wanted

    @torch.inference_mode()
    def capture_wanted(self) -> None:
        """See `Programs.capture_wanted`."""
        self._programs.capture_wanted(self.has_room)

    @property
    def graph_bytes(self) -> int:
        """What the graphs captured so far take."""
        return self._programs.graph_bytes

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile the kernels and capture the graphs."""
        ways = [DRAWN, GREEDY]
        if self._model.lanes.sampler.has_masks:
            ways += [needs._replace(masks=True) for needs in ways]
        for num_tokens in {PAD_TOKENS, min(_WARM_UP_TOKENS, self._max_tokens)}:
            self._run_padding(num_tokens, ways)  # sampling few rows and many is two kernels
        self._programs.capture_all()

    def close(self) -> None:
        """Free the graphs now: whenever a collection finds them, somebody else may be capturing.
        And let go of the weights, whoever still holds the runner."""
        self._programs.close()
        del self._model

    @torch.inference_mode()
    def profile(self, num_tokens: int, sampling: SamplingParams) -> int:
        """See `ProfiledRunner`."""
        command = largest_iteration(num_tokens, sampling, lanes=self._lanes, longest=self._longest)
        return peak_bytes(partial(self._launch, command), self._model.device)

    def _launch(self, command: RunIteration) -> None:
        model, rows = self._model, _decode_rows_first(command.rows)
        model.bind(command.bindings)
        forward = LaunchedPass(model, rows, model.lanes.needs(rows), {}, is_staged=False)
        forward.run_layers(range(model.layout.num_layers))
        forward.sample()

    def _run_padding(self, num_tokens: int, ways: Iterable[Needs]) -> None:
        """A pass over nothing but padding, sampled in all these ways: touches no KV."""
        model = self._model
        fed = model.fed_tokens(num_tokens, 0)
        model.upload(fed, (), {})
        tiles = torch.full((1, 4), -1, dtype=torch.int32, device=model.device)
        step, hidden = model.embed(fed, decode_tokens=0, tiles=tiles)
        model.run_layers(range(model.layout.num_layers), hidden, step)
        head_input = model.head_input(hidden)
        for needs in ways:
            model.choose(head_input, fed.lanes, fed.positions, needs)


class LaunchedPass(Results):
    """An iteration whose kernels are launched one by one."""

    def __init__(
        self,
        model: FusedModel,
        rows: Sequence[Row],
        needs: Needs,
        updates: Updates,
        *,
        is_staged: bool,
    ) -> None:
        super().__init__(rows)
        self._model = model
        self._needs = needs
        num_tokens = sum(row.num_tokens for row in rows)
        decode_tokens = sum(row.num_tokens == 1 for row in rows)
        self._sampled = [row for row in rows if row.is_sampled]
        last = torch.tensor(list(last_tokens(rows, decode_tokens)), dtype=torch.int32).view(-1, 3).T
        tiles = model.attention.tiles(rows[decode_tokens:], decode_tokens)
        updates = model.make_room(updates, model.most_updates)
        fed = model.fed_tokens(-(-num_tokens // PAD_TOKENS) * PAD_TOKENS, len(updates))
        more = model.upload(fed, rows, updates, torch.cat((last.flatten(), tiles.flatten())))
        self._last = more[: last.numel()].view(3, -1).unbind(0)
        tiles_there = more[last.numel() :].view(-1, 4)
        self._step, self._hidden = model.embed(
            fed,
            decode_tokens=decode_tokens,
            tiles=tiles_there if len(tiles) else None,
            # A FlashInfer plan is copied by a copy engine, where it would wait for staged KV.
            chunks=() if is_staged else rows[decode_tokens:],
        )

    def run_layers(self, layers: range) -> None:
        if self.rows:
            self._model.run_layers(layers, self._hidden, self._step)

    def sample(self) -> None:
        """The last of it: by its events' time the next iteration is long being launched, and
        must find the memory of this one."""
        hidden = self._hidden
        del self._hidden, self._step
        lanes = self._model.lanes
        if any(map(lanes.wants_scores, self.rows)):
            self.scores = list(lanes.scores(self.rows, hidden.sum()))
        if self._sampled:
            rows, sampled_lanes, positions = self._last
            hidden = hidden.rows(lambda all_rows: all_rows.index_select(0, rows))
            head_input = self._model.head_input(hidden)
            chosen = self._model.choose(head_input, sampled_lanes, positions, self._needs)
            self.reports = lanes.report(self._sampled, chosen)


class ReplayedPass(Results):
    """An iteration that replays its graphs."""

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
        program.upload(rows, updates)
        program.begin()

    def run_layers(self, layers: range) -> None:
        self._program.run_layers(layers)

    def sample(self) -> None:
        sampled = [row for row in self.rows if row.is_sampled]
        if sampled:
            chosen = self._program.sample(self.rows, self._needs)
            self.reports = self._model.lanes.report(sampled, chosen)


FusedPass = LaunchedPass | ReplayedPass


def _decode_rows_first(rows: Sequence[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row.num_tokens > 1)
