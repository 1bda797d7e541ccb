"""One engine under one load, and the row of numbers that comes of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any

import msgspec

from pie_async import Engine
from pie_async.cli.load import EngineTarget, Prompts, clock_of, put_load
from pie_async.config import EngineConfig
from pie_async.measurements import RequestTimes, percentile, summarize
from pie_async.metrics import EngineStats
from pie_async.workload import WorkItem, clip
from scripts.paper.results import freeze, thaw

FIRST_TOKEN = 10
STEADY_FROM, STEADY_TO = 0.25, 0.75
"""Of the output tokens: between them the steady throughput is measured, without the time in
which the batch fills and the one in which it runs dry."""
SAMPLING_S = 0.1


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One load on one engine. Times are seconds, percentiles those of requests answered in full."""

    model: str
    workload: str
    requests: int
    """Answered in full."""
    sent: int = 0
    requests_per_s: float
    """0: all at once."""
    kv_bytes: int
    mode: str
    output_tokens_per_s: float
    steady_tokens_per_s: float
    """While neither the first nor the last quarter of the output was produced."""
    duration_s: float
    iterations: int
    mean_iteration_s: float
    compute_s: float
    stall_share: float
    prompt_tokens_computed: int
    """More than the prompts have: they were computed again."""
    preemptions_parked: int
    preemptions_recomputed: int
    streamed_bytes: int
    """From the pool to the device, all in all; promotions too."""
    demoted_bytes: int = 0
    """From the device to the pool, all in all."""
    link_busy_share: float
    mean_streamed_blocks: float
    expansion_bound: float
    """Most that hides, as a factor of the device's KV: link times the iteration's time."""
    normalized_p50_s: float
    """Submit to end, divided by the output's tokens."""
    normalized_p99_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    ttft_max_s: float = 0.0
    tpot_p50_s: float
    tpot_p99_s: float
    longest_gap_s: float = 0.0
    """Between two tokens of any request, cut-off ones included: large when somebody starves."""


@contextlib.asynccontextmanager
async def running(config: EngineConfig) -> AsyncIterator[Engine]:
    """An engine that has answered a few requests already."""
    began_s = time.perf_counter()
    async with Engine(config) as engine:
        freeze()
        print(f"[{config.model}: started in {time.perf_counter() - began_s:.1f} s]", flush=True)
        warm_up = [WorkItem(prompt_tokens=64, output_tokens=8)] * 8
        await put_load(EngineTarget(engine), warm_up, _fill(engine, seed=0))
        yield engine
    thaw()


class Engines:
    """One engine at a time, kept as long as the next row wants the same configuration: a start
    takes 10 to 25 s on a GPU.

    Args:
        runner: whose loop it runs on, between rows too.
    """

    def __init__(self, runner: asyncio.Runner) -> None:
        self._runner = runner
        self._open: tuple[EngineConfig, AbstractAsyncContextManager[Engine], Engine] | None = None

    def of(self, config: EngineConfig) -> Engine:
        """The engine of this configuration; the one before it is stopped if it is another."""
        if self._open is None or self._open[0] != config:
            self.close()
            manager = running(config)
            self._open = config, manager, self._runner.run(manager.__aenter__())
        return self._open[2]

    def close(self) -> None:
        """Stop what runs."""
        if self._open is not None:
            self._runner.run(self._open[1].__aexit__(None, None, None))
            self._open = None


async def measure(config: EngineConfig, items: Sequence[WorkItem], **how: Any) -> Row:
    """As `measure_on`, with an engine of its own."""
    async with running(config) as engine:
        return await measure_on(engine, items, **how)


async def measure_on(
    engine: Engine,
    items: Sequence[WorkItem],
    *,
    mode: str,
    workload: str,
    requests_per_s: float = 0.0,
    seed: int = 0,
    limit_s: float | None = None,
    until: float = 1.0,
    on_end: Callable[[Sequence[RequestTimes]], None] = lambda _: None,
) -> Row:
    """Put a load on an engine on which nothing else runs.

    Args:
        mode: what the row calls this configuration.
        requests_per_s: the rate at which `items` arrive; 0: all at once.
        limit_s: when the load is cut off; None: all requests are answered.
        until: cut it off once this share of all output that was asked for is there: whatever the
            mode, about the same tokens then are.
        on_end: told of the requests as clients saw them.
    """
    config = engine.config
    fitting = [_fitting(item, engine.model.max_model_len) for item in items]
    before = engine.stats()
    streamed = _Streamed(engine)
    load = _Load(engine, fitting, _fill(engine, seed=seed), until)
    await load.run(limit_s)
    mean_streamed = streamed.stop()
    spent = spent_between(before, engine.stats())
    kv_bytes = before.device_blocks * before.block_bytes
    on_end(load.requests)
    iterations = max(1, spent.iterations)
    mean_s = (spent.compute_s + spent.stall_s) / iterations
    link = spent.h2d_bytes / spent.h2d_busy_s if spent.h2d_busy_s else 0.0
    return Row(
        model=config.model,
        workload=workload,
        requests_per_s=requests_per_s,
        kv_bytes=config.device_kv_bytes or kv_bytes,
        mode=mode,
        iterations=iterations,
        mean_iteration_s=mean_s,
        compute_s=spent.compute_s,
        stall_share=spent.stall_share,
        prompt_tokens_computed=spent.prompt_tokens,
        preemptions_parked=spent.preemptions_parked,
        preemptions_recomputed=spent.preemptions_recomputed,
        streamed_bytes=spent.h2d_bytes,
        demoted_bytes=spent.d2h_bytes,
        link_busy_share=spent.h2d_busy_s / load.duration_s,
        mean_streamed_blocks=mean_streamed,
        expansion_bound=1 + link * mean_s / (config.device_kv_bytes or kv_bytes),
        **seen_by_clients(load.requests, load.duration_s, load.asked_tokens),
    )


def seen_by_clients(
    requests: Sequence[RequestTimes], duration_s: float, asked_tokens: int | None = None
) -> dict[str, Any]:
    """The fields of a row that any engine's clients can tell.

    Args:
        requests: all that were sent.
        duration_s: of the load.
        asked_tokens: output asked for by a load that was cut off once enough of it was there;
            the steady throughput is that of the same tokens then. None: what was put out.
    """
    summary = summarize(requests, duration_s=duration_s)
    ttft, tpot = summary.ttft_s, summary.tpot_s
    done = [request for request in requests if request.is_complete]
    normalized = sorted(request.e2e_s / max(1, request.output_tokens) for request in done)
    return {
        "requests": len(done),
        "sent": len(requests),
        "output_tokens_per_s": sum(r.output_tokens for r in requests) / duration_s,
        "steady_tokens_per_s": _steady(requests, asked_tokens),
        "duration_s": duration_s,
        "normalized_p50_s": percentile(normalized, 50) if normalized else 0.0,
        "normalized_p99_s": percentile(normalized, 99) if normalized else 0.0,
        "ttft_p50_s": ttft.p50 if ttft else 0.0,
        "ttft_p99_s": ttft.p99 if ttft else 0.0,
        "ttft_max_s": ttft.max if ttft else 0.0,
        "tpot_p50_s": tpot.p50 if tpot else 0.0,
        "tpot_p99_s": tpot.p99 if tpot else 0.0,
        "longest_gap_s": max((gap for r in requests for gap in r.itl_s), default=0.0),
    }


class _Load:
    """Requests as clients see them; those that a limit in time cut off count their tokens only."""

    def __init__(
        self, engine: Engine, items: Sequence[WorkItem], fill: Prompts, until: float
    ) -> None:
        self.asked_tokens = sum(item.output_tokens for item in items) if until < 1 else None
        self._missing_tokens = until * self.asked_tokens if self.asked_tokens else 1.0
        self._is_enough = asyncio.Event()
        self._target = EngineTarget(engine)
        self._items = items
        self._fill = fill
        self._clock = clock_of(engine.config)
        self.requests: list[RequestTimes] = []
        self.duration_s = 0.0
        self._began_s = 0.0

    async def run(self, limit_s: float | None) -> None:
        """Send every request at its time, until all are answered or time is up."""
        prompts = [self._fill.of(item, number) for number, item in enumerate(self._items)]
        self._began_s = self._clock()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._one(item, prompt))
                    for item, prompt in zip(self._items, prompts, strict=True)
                ]
                if self.asked_tokens is not None:
                    await self._is_enough.wait()
                    for task in tasks:
                        task.cancel()
        self.duration_s = self._clock() - self._began_s

    async def _one(self, item: WorkItem, prompt: list[int]) -> None:
        await asyncio.sleep(max(0.0, self._began_s + item.arrival_s - self._clock()))
        times = RequestTimes(submitted_s=self._clock(), prompt_tokens=len(prompt))
        self.requests.append(times)
        stream = self._target.stream(prompt, output_tokens=item.output_tokens)
        async with contextlib.aclosing(stream):
            async for count in stream:
                times.arrived(self._clock(), count)
                self._count(count)
        times.finished_s = self._clock()

    def _count(self, tokens: int) -> None:
        if self.asked_tokens is not None:
            self._missing_tokens -= tokens
            if self._missing_tokens <= 0:
                self._is_enough.set()


class _Streamed:
    """Samples how many blocks are streamed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: list[int] = []
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            self._seen.append(self._engine.stats().streamed_blocks)
            await asyncio.sleep(SAMPLING_S)

    def stop(self) -> float:
        """The mean."""
        self._task.cancel()
        return sum(self._seen) / max(1, len(self._seen))


def _fill(engine: Engine, *, seed: int) -> Prompts:
    return Prompts(vocab_size=engine.model.vocab_size, first_token=FIRST_TOKEN, seed=seed)


def _fitting(item: WorkItem, longest: int) -> WorkItem:
    """As it is where the engine takes it; `clip` alone would shorten a prompt that fits."""
    if item.prompt_tokens + item.output_tokens <= longest:
        return item
    return clip(item, longest)


def _steady(requests: Sequence[RequestTimes], asked_tokens: int | None) -> float:
    """Output tokens per second between the shares of the output; see `STEADY_FROM`."""
    times_s = sorted(time_s for request in requests for time_s in request.token_s)
    tokens = asked_tokens or len(times_s)
    first, last = int(STEADY_FROM * tokens), min(int(STEADY_TO * tokens), len(times_s) - 1)
    if last - first < 2:
        return 0.0
    return (last - first) / max(1e-9, times_s[last] - times_s[first])


def spent_between(first: EngineStats, last: EngineStats) -> EngineStats:
    """What was done from one snapshot to a later one."""
    names = (
        "iterations", "compute_s", "stall_s", "h2d_bytes", "h2d_busy_s", "d2h_bytes",
        "prompt_tokens", "preemptions_parked", "preemptions_recomputed",
    )  # fmt: skip
    return EngineStats(**{name: getattr(last, name) - getattr(first, name) for name in names})
