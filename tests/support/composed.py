"""The same requests with and without streaming, in the same batches, to compare bit for bit."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from pie_async import Engine, SamplingParams
from pie_async.messages import RunIteration
from pie_async.outputs import CompletionOutput, TokenLogprobs

Composition = tuple[tuple[int, int, int, bool], ...]
"""Of an iteration: (sequence, first position, tokens, whether one is sampled) of each row."""


@dataclass
class Found:
    """What came of a run."""

    tokens: list[tuple[int, ...]] = field(default_factory=list)
    logprobs: list[tuple[TokenLogprobs, ...] | None] = field(default_factory=list)
    compositions: list[Composition] = field(default_factory=list)
    num_staged: int = 0
    """Iterations that streamed."""


async def run(
    prompts: list[list[int]], params: SamplingParams, *, least_blocks: int = 0, **options: Any
) -> Found:
    """Submit all prompts in one turn of the loop, so that one plan sees them all.

    Args:
        least_blocks: streamed although there is room for everything, as soon as so many are
            sealed; with `streamed_blocks` among the options.
    """
    found = Found()

    async def read(stream) -> CompletionOutput:
        async for output in stream:
            last = output
        return last.outputs[0]

    async with Engine(**options) as engine:
        assert engine.story is not None
        engine.story.keep_all()
        if least_blocks:
            await engine.fix_streaming(options["streamed_blocks"], least_blocks=least_blocks)
        streams = [await engine.submit(prompt, params) for prompt in prompts]
        for out in await asyncio.gather(*map(read, streams)):
            found.tokens.append(out.token_ids)
            found.logprobs.append(out.logprobs)
        assert engine.story is not None
        for entry in engine.story:
            if isinstance(entry.message, RunIteration) and entry.message.rows:
                rows = entry.message.rows
                found.compositions.append(
                    tuple((row.sequence, row.start, row.num_tokens, row.is_sampled) for row in rows)
                )
                found.num_staged += entry.message.is_staged
    return found
