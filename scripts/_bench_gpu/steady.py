"""A batch that only decodes: how long its iterations take, on the GPU and on the host."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any

import msgspec

from pie_async import Engine, SamplingParams
from pie_async.measurements import Distribution
from pie_async.metrics import EngineStats
from pie_async.request_stream import RequestStream
from scripts._bench_gpu.host_time import HostTime

SETTLING_ITERATIONS = 12
"""After the last prompt: until then graphs may be captured, and rows are still prefilling."""
SPARE_TOKENS = 400
"""Outputs are this much longer than measured, so that none ends within the window."""


class Steady(msgspec.Struct, frozen=True, kw_only=True):
    """A window of decode iterations."""

    batch: int
    context: int
    iterations: int
    iteration_s: float
    """Median time between two tokens of one sequence."""
    iterations_s: Distribution | None
    mean_s: float
    """Wall time of the window by the engine's count of iterations."""
    compute_s: float
    """Mean time of an iteration on the compute stream."""
    idle_share: float
    """Of the window's wall time, without work on the compute stream."""
    host_s: float
    """Processor time of all threads per iteration."""
    host_by_thread_s: dict[str, float]


async def steady_decode(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    *,
    iterations: int,
    window: AbstractContextManager[Any] | None = None,
) -> Steady:
    """Run the prompts together until all of them decode, then measure so many iterations.

    Only one of the requests is read token by token; the others are read by nobody, so that the
    host time is the engine's own.

    Args:
        window: entered and left with what is measured.
    """
    before = engine.stats()
    room = engine.model.max_model_len - max(map(len, prompts))
    params = SamplingParams(
        max_tokens=min(room, iterations + SPARE_TOKENS),
        temperature=0.0,
        ignore_eos=True,
        output_kind="final",
    )
    probe_params = msgspec.structs.replace(params, output_kind="delta")
    streams = [await engine.submit(prompt, params) for prompt in prompts[:-1]]
    probe = await engine.submit(prompts[-1], probe_params)
    needed = sum(map(len, prompts))
    try:
        await _all_decoding(engine, probe, before, needed)
        with window or contextlib.nullcontext():
            return await _measure(engine, probe, len(prompts), iterations)
    finally:
        for stream in (*streams, probe):
            stream.cancel()
        for stream in streams:
            async for _ in stream:
                pass


async def _all_decoding(
    engine: Engine, probe: RequestStream, before: EngineStats, needed: int
) -> None:
    settled = 0
    async for _ in probe:
        now = engine.stats()
        done = now.prompt_tokens + now.cached_tokens - before.prompt_tokens - before.cached_tokens
        settled += done >= needed
        if settled > SETTLING_ITERATIONS:
            return
    raise RuntimeError("the probe ended before all prompts were computed")


async def _measure(engine: Engine, probe: RequestStream, batch: int, iterations: int) -> Steady:
    first, host = engine.stats(), HostTime()
    began_s = last_s = time.perf_counter()
    gaps_s: list[float] = []
    async for output in probe:
        now_s = time.perf_counter()
        count = sum(len(choice.token_ids) for choice in output.outputs)
        gaps_s += [(now_s - last_s) / max(1, count)] * count
        last_s = now_s
        if len(gaps_s) >= iterations:
            break
    last, wall_s = engine.stats(), time.perf_counter() - began_s
    ran = max(1, last.iterations - first.iterations)
    compute_s = last.compute_s - first.compute_s
    gaps = Distribution.of(gaps_s)
    return Steady(
        batch=batch,
        context=0,
        iterations=ran,
        iteration_s=gaps.p50 if gaps else 0.0,
        iterations_s=gaps,
        mean_s=wall_s / ran,
        compute_s=compute_s / ran,
        idle_share=max(0.0, 1 - compute_s / wall_s),
        host_s=host.total_s() / ran,
        host_by_thread_s={name: used / ran for name, used in host.by_thread_s().items()},
    )
