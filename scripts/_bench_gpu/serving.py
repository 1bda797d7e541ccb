"""Requests from submit to end: throughput, latencies, time to the first token."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence

import msgspec

from pie_async import Engine, SamplingParams
from pie_async.cli.load import EngineTarget, Prompts, put_load
from pie_async.measurements import LoadSummary, summarize
from pie_async.workload import WorkItem

FIRST_TOKEN = 10


def prompts_of(engine: Engine, seed: int) -> Prompts:
    return Prompts(vocab_size=engine.model.vocab_size, first_token=FIRST_TOKEN, seed=seed)


class Saturated(msgspec.Struct, frozen=True, kw_only=True):
    """All requests submitted at once."""

    duration_s: float
    output_tokens: int
    iterations: int
    compute_s: float
    preempted: int

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.duration_s


async def saturated(engine: Engine, items: Sequence[WorkItem], *, seed: int) -> Saturated:
    """Submit everything, read only the ends."""
    fill = prompts_of(engine, seed)
    prompts = [fill.of(item, number) for number, item in enumerate(items)]
    before, began_s = engine.stats(), time.perf_counter()

    async def one(prompt: list[int], item: WorkItem) -> int:
        params = SamplingParams(
            max_tokens=item.output_tokens, temperature=0.0, ignore_eos=True, output_kind="final"
        )
        async for output in engine.generate(prompt, params):
            last = output
        return len(last.outputs[0].token_ids)

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(prompt, item))
            for prompt, item in zip(prompts, items, strict=True)
        ]
    duration_s, after = time.perf_counter() - began_s, engine.stats()
    return Saturated(
        duration_s=duration_s,
        output_tokens=sum(task.result() for task in tasks),
        iterations=after.iterations - before.iterations,
        compute_s=after.compute_s - before.compute_s,
        preempted=after.preemptions_parked - before.preemptions_parked,
    )


async def at_rate(engine: Engine, items: Sequence[WorkItem], *, seed: int) -> LoadSummary:
    """Send requests at their arrival times and read every token."""
    run = await put_load(EngineTarget(engine), items, prompts_of(engine, seed))
    return summarize(run.requests, duration_s=run.duration_s)


class Prefill(msgspec.Struct, frozen=True, kw_only=True):
    """Prompts with one output token each."""

    wall_s: float
    """From submit to the last first token."""
    compute_s: float


async def prefill(engine: Engine, *, batch: int, tokens: int, seed: int) -> Prefill:
    run = await saturated(
        engine, [WorkItem(prompt_tokens=tokens, output_tokens=1)] * batch, seed=seed
    )
    return Prefill(wall_s=run.duration_s, compute_s=run.compute_s)


async def repeated(
    measure: Callable[[int], Awaitable[float]], *, rounds: int, seconds: float
) -> list[float]:
    """Measure with seeds 0, 1, ... until there are enough rounds or time is up."""
    began_s, found = time.perf_counter(), [await measure(0)]
    while len(found) < rounds and time.perf_counter() - began_s < seconds:
        found.append(await measure(len(found)))
    return found


def median(values: Sequence[float]) -> float:
    return statistics.median(values)
