"""Puts a workload on an engine or a server and measures it from the client's side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import Protocol

import msgspec

from pie_async.config import EngineConfig
from pie_async.errors import PieError
from pie_async.measurements import RequestTimes
from pie_async.metrics import EngineStats
from pie_async.openai.backend import Backend
from pie_async.sampling_params import SamplingParams
from pie_async.workload import WorkItem, prompt_token_ids

Clock = Callable[[], float]

WATCH_EVERY_S = 0.05


def clock_of(config: EngineConfig) -> Clock:
    """The running loop's on the simulated device, where time is virtual; elsewhere a finer one than
    uvloop's."""
    return asyncio.get_running_loop().time if config.device == "sim" else time.perf_counter


class Target(Protocol):
    """Whatever answers requests."""

    def stream(self, prompt: Sequence[int], *, output_tokens: int) -> AsyncGenerator[int, None]:
        """How many output tokens came, each time some come. Raises PieError."""


class EngineTarget:
    """An engine in this process."""

    def __init__(self, engine: Backend, *, temperature: float = 0.0) -> None:
        self._engine = engine
        self._temperature = temperature

    async def stream(
        self, prompt: Sequence[int], *, output_tokens: int
    ) -> AsyncGenerator[int, None]:
        params = SamplingParams(
            max_tokens=output_tokens,
            temperature=self._temperature,
            ignore_eos=True,
            output_kind="delta",
        )
        outputs = await self._engine.submit(prompt, params)
        try:
            async for output in outputs:
                yield sum(len(choice.token_ids) for choice in output.outputs)
        finally:
            outputs.cancel()  # does nothing after the end


class Prompts(msgspec.Struct, frozen=True, kw_only=True):
    """How the prompts of a workload are filled."""

    vocab_size: int
    first_token: int = 0
    seed: int = 0

    def of(self, item: WorkItem, number: int) -> list[int]:
        return prompt_token_ids(
            item,
            number=number,
            vocab_size=self.vocab_size,
            first_token=self.first_token,
            seed=self.seed,
        )


class LoadRun(msgspec.Struct, frozen=True, kw_only=True):
    """What a run gave."""

    requests: list[RequestTimes]
    duration_s: float
    started_s: float


async def put_load(
    target: Target,
    items: Sequence[WorkItem],
    prompts: Prompts,
    *,
    concurrency: int | None = None,
    clock: Clock = time.perf_counter,
    on_finished: Callable[[RequestTimes], None] = lambda _: None,
) -> LoadRun:
    """Send every request at its time and wait for all of them.

    Args:
        concurrency: most requests open at once; later ones are sent as earlier ones end, and
            their clocks start then. None: as many as arrive.
        clock: the loop's own where it is virtual; uvloop's stands still within a turn.
        on_finished: told of each request at its end.
    """
    room = asyncio.Semaphore(concurrency if concurrency is not None else max(1, len(items)))
    filled = [prompts.of(item, number) for number, item in enumerate(items)]
    started_s = clock()

    async def one(item: WorkItem, prompt: list[int]) -> RequestTimes:
        await asyncio.sleep(max(0.0, started_s + item.arrival_s - clock()))
        async with room:
            times = await _measure(target, prompt, item.output_tokens, clock)
        on_finished(times)
        return times

    async with asyncio.TaskGroup() as group:
        tasks = [
            group.create_task(one(item, prompt)) for item, prompt in zip(items, filled, strict=True)
        ]
    requests = [task.result() for task in tasks]
    return LoadRun(requests=requests, duration_s=_duration(requests), started_s=started_s)


async def _measure(
    target: Target, prompt: Sequence[int], output_tokens: int, clock: Clock
) -> RequestTimes:
    times = RequestTimes(submitted_s=clock(), prompt_tokens=len(prompt))
    try:
        async with aclosing(target.stream(prompt, output_tokens=output_tokens)) as counts:
            async for num_tokens in counts:
                times.arrived(clock(), num_tokens)
    except PieError as error:
        times.error = str(error)
    times.finished_s = clock()
    return times


def _duration(requests: Sequence[RequestTimes]) -> float:
    """First submission to last end; 0 without requests."""
    ends = [request.finished_s or request.submitted_s for request in requests]
    starts = [request.submitted_s for request in requests]
    return max(ends, default=0.0) - min(starts, default=0.0)


class PoolSample(msgspec.Struct, frozen=True, kw_only=True):
    """The pool at one moment of a run."""

    at_s: float
    running: int
    waiting: int
    resident_blocks: int
    streamed_blocks: int
    parked_blocks: int
    expansion_ratio: float


class PoolSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine's own counters say of a run."""

    device_blocks: int
    host_blocks: int
    block_bytes: int
    resident_blocks_peak: int
    streamed_blocks_peak: int
    parked_blocks_peak: int
    expansion_ratio_peak: float
    running_peak: int
    iterations: int
    compute_s: float
    stall_s: float
    stall_share: float
    mask_wait_s: float = 0.0
    preemptions_parked: int
    preemptions_recomputed: int
    demotions: int
    promotions: int
    h2d_bytes: int
    d2h_bytes: int
    timeline: list[PoolSample]


class PoolWatch:
    """Samples an engine's counters while a run goes on."""

    def __init__(self, engine: Backend, clock: Clock = time.perf_counter) -> None:
        self._engine = engine
        self._clock = clock
        self._first = self._last = engine.stats()
        self._samples: list[PoolSample] = []

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Sample inside the block; counters are read once more at its end."""
        async with asyncio.TaskGroup() as group:
            task = group.create_task(self._sample())
            try:
                yield
            finally:
                task.cancel()
                self._last = self._engine.stats()
                self._take(self._last, self._clock())

    async def _sample(self) -> None:
        self._first = self._engine.stats()
        while True:
            self._take(self._engine.stats(), self._clock())
            await asyncio.sleep(WATCH_EVERY_S)

    def _take(self, stats: EngineStats, at_s: float) -> None:
        self._samples.append(
            PoolSample(
                at_s=at_s,
                running=stats.running,
                waiting=stats.waiting,
                resident_blocks=stats.resident_blocks,
                streamed_blocks=stats.streamed_blocks,
                parked_blocks=stats.parked_blocks,
                expansion_ratio=stats.expansion_ratio,
            )
        )

    def summary(self, *, started_s: float, most_samples: int = 500) -> PoolSummary:
        """What was seen; the timeline starts at the run's start and is thinned evenly."""
        first, last, samples = self._first, self._last, self._samples
        compute_s = last.compute_s - first.compute_s
        stall_s = last.stall_s - first.stall_s
        every = -(-len(samples) // most_samples) or 1
        return PoolSummary(
            device_blocks=last.device_blocks,
            host_blocks=last.host_blocks,
            block_bytes=last.block_bytes,
            resident_blocks_peak=max(sample.resident_blocks for sample in samples),
            streamed_blocks_peak=max(sample.streamed_blocks for sample in samples),
            parked_blocks_peak=max(sample.parked_blocks for sample in samples),
            expansion_ratio_peak=max(sample.expansion_ratio for sample in samples),
            running_peak=max(sample.running for sample in samples),
            iterations=last.iterations - first.iterations,
            compute_s=compute_s,
            stall_s=stall_s,
            stall_share=stall_s / (compute_s + stall_s) if compute_s + stall_s > 0 else 0.0,
            mask_wait_s=last.mask_wait_s - first.mask_wait_s,
            preemptions_parked=last.preemptions_parked - first.preemptions_parked,
            preemptions_recomputed=last.preemptions_recomputed - first.preemptions_recomputed,
            demotions=last.demotions - first.demotions,
            promotions=last.promotions - first.promotions,
            h2d_bytes=last.h2d_bytes - first.h2d_bytes,
            d2h_bytes=last.d2h_bytes - first.d2h_bytes,
            timeline=[
                msgspec.structs.replace(sample, at_s=max(0.0, sample.at_s - started_s))
                for sample in samples[::every]
            ],
        )
