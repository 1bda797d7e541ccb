"""Drives a ModelRunner without engine, scheduler or device: it owns the slots itself."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from pie_async.messages import (
    LaneBinding,
    PromptLogprobs,
    Row,
    RunIteration,
    SampledToken,
    TableUpdate,
)
from pie_async.model.decoder import Decoder
from pie_async.model.runner import ModelRunner
from pie_async.sampling_params import SamplingParams

GREEDY = SamplingParams(temperature=0.0)


@dataclasses.dataclass
class _Running:
    """A sequence: what was fed, and where its KV lies."""

    prompt: tuple[int, ...]
    sampling: SamplingParams
    fed: int = 0
    num_output: int = 0
    slots: list[int] = dataclasses.field(default_factory=list)


class DirectRunner:
    """Runs prompts together through a ModelRunner and keeps every sampled row's logits.

    Args:
        slots: per layer; which of them a block gets is drawn from `seed`.
        poison: fill all KV with NaN first, as if freed slots had been poisoned.
        make_runner: another kind of runner; then no logits are kept.
        num_groups: in which layers run; None: layer by layer.
    """

    def __init__(
        self,
        decoder: Decoder,
        *,
        lanes: int = 8,
        slots: int = 256,
        block_tokens: int = 4,
        max_blocks: int = 64,
        seed: int = 0,
        poison: bool = True,
        make_runner: Callable[..., Any] = ModelRunner,
        num_groups: int | None = None,
    ) -> None:
        config = decoder.config
        shape = (slots, 2, config.kv_heads, block_tokens, config.head_dim)
        fill = float("nan") if poison else 0.0
        self.kv = [
            torch.full(shape, fill, dtype=decoder.dtype, device=decoder.device)
            for _ in range(config.num_layers)
        ]
        self.runner = make_runner(
            decoder, self.kv, lanes=lanes, max_blocks=max_blocks, block_tokens=block_tokens
        )
        layers, groups = config.num_layers, num_groups or config.num_layers
        self._groups = [
            range(index * layers // groups, (index + 1) * layers // groups)
            for index in range(groups)
        ]
        self._block_tokens = block_tokens
        self._free = list(range(slots))
        random.Random(seed).shuffle(self._free)
        self._running: dict[int, _Running] = {}
        self._iteration = 0
        self._logits: list[Tensor] = []
        self.logits: dict[int, list[Tensor]] = {}
        """By lane: the [vocab] logits of each of its sampled tokens, before sampling."""
        if make_runner is not ModelRunner:
            return
        sample = self.runner._lanes.sampler.sample

        def keep_and_sample(logits, *args):
            self._logits = list(logits.clone())
            return sample(logits, *args)

        self.runner._lanes.sampler.sample = keep_and_sample

    def submit(
        self, lane: int, prompt: Sequence[int], sampling: SamplingParams = GREEDY
    ) -> LaneBinding:
        """A binding to give to the next `iterate`."""
        self._running[lane] = _Running(tuple(prompt), sampling)
        self.logits[lane] = []
        return LaneBinding(
            lane=lane,
            sequence=100 + lane,
            sampling=sampling,
            seed=lane,
            stop_ids=(),
            prompt_len=len(prompt),
            history=tuple(prompt) if sampling.counts_tokens else (),
        )

    def table(self, lane: int) -> TableUpdate:
        """All of the lane's block table."""
        return TableUpdate(lane, 0, tuple(self._running[lane].slots))

    def row(self, lane: int, most: int | None = None) -> tuple[Row, list[TableUpdate]]:
        """The lane's next chunk of at most `most` prompt tokens, or its next decode row."""
        sequence = self._running[lane]
        tokens = sequence.prompt[sequence.fed :][:most]
        is_sampled = sequence.fed + len(tokens) >= len(sequence.prompt)
        row = Row(100 + lane, lane, sequence.fed, tokens, is_sampled)
        sequence.fed += row.num_tokens
        first = len(sequence.slots)
        while len(sequence.slots) * self._block_tokens < sequence.fed:
            sequence.slots.append(self._free.pop())
        new = tuple(sequence.slots[first:])
        return row, [TableUpdate(lane, first, new)] if new else []

    def iterate(
        self,
        lanes: Sequence[int],
        *,
        bindings: Sequence[LaneBinding] = (),
        chunk: int | None = None,
        tables: Sequence[TableUpdate] = (),
        masks: Mapping[int, int] | None = None,
        is_staged: bool = False,
    ) -> tuple[tuple[SampledToken, ...], tuple[PromptLogprobs, ...]]:
        """One iteration with a row for each of these lanes, one layer group after the other.

        Args:
            tables: updates beside those of new blocks.
            masks: by lane, the slot of the mask that it samples under.
        """
        rows, updates = [], list(tables)
        for lane in lanes:
            row, update = self.row(lane, chunk)
            rows.append(msgspec.structs.replace(row, mask=(masks or {}).get(lane)))
            updates += update
        command = RunIteration(
            iteration=self._iteration,
            rows=tuple(rows),
            bindings=tuple(bindings),
            tables=tuple(updates),
            is_staged=is_staged,
        )
        self._iteration += 1
        forward = self.runner.begin(command)
        for layers in self._groups:
            self.runner.run_layers(forward, layers)
        self._logits = []
        self.runner.sample(forward)
        if self.kv[0].is_cuda:  # elsewhere an event says when results may be read
            torch.cuda.synchronize()
        if getattr(self.runner, "wants_graphs", False):
            self.runner.capture_wanted()
        forward.collect()
        for token, logits in zip(forward.sampled, self._logits, strict=False):
            self.logits[token.sequence - 100].append(logits)
        return forward.sampled, forward.prompt_logprobs

    def generate(
        self, prompts: Sequence[Sequence[int]], num_tokens: int, *, chunk: int | None = None
    ) -> list[list[int]]:
        """Output tokens of all prompts, run together; prompts in chunks mix with decode rows."""
        bindings = [self.submit(lane, prompt) for lane, prompt in enumerate(prompts)]
        outputs: list[list[int]] = [[] for _ in prompts]
        while lanes := [lane for lane, out in enumerate(outputs) if len(out) < num_tokens]:
            sampled, _ = self.iterate(lanes, bindings=bindings, chunk=chunk)
            bindings = []
            for token in sampled:
                outputs[token.sequence - 100].append(token.token)
        return outputs
