"""What a GPU would do with a load, with and without pooling: simulated, beside the bound.

Nothing here has been measured on the GPU in question. `HOW_FAR_OFF` says what is known of the
simulator's error.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import msgspec

from pie_async.cli.load import EngineTarget, Prompts, put_load
from pie_async.config import (
    GIB,
    MAX_STREAMED_BYTES,
    MIB,
    PEER_MAX_STREAMED_BYTES,
    EngineConfig,
    format_size,
)
from pie_async.device.cost_model import (
    Link,
    ModelShape,
    gpu_named,
    link_named,
    pooling_bound,
)
from pie_async.errors import ConfigError
from pie_async.measurements import Distribution, RequestTimes
from pie_async.metrics import EngineStats
from pie_async.workload import WorkItem

HOW_FAR_OFF = (
    "Simulated, not measured. Beside an H200 its throughput was 3 to 11 % high without a pool, "
    "4 to 10 % high with the host pool and -1 to 12 % high with one in a second H200; its gains "
    "were -1 to 1 % high with the host pool and -3 to 3 % high with the other. It has been "
    "compared with no other GPU (docs/deciding.md)."
)
WORK_BYTES = 600 * MIB + 3 * GIB
"""What a card holds beside weights and KV: context, activations, graphs. About."""
RING_SHARE = 0.25
"""Of what one iteration may stream; the staging ring takes it from the arena."""
NEAR_BYTES_PER_S = 150e9
"""Links above this stream more in an iteration, as with a pool in another GPU."""
STEADY_FROM, STEADY_TO = 0.25, 0.75
"""Of the output: between them throughput is steady, the batch neither fills nor runs dry."""
LATENCY_LOAD = 0.9
"""Share of the requests/s that saturate it without a pool, at which latencies are compared."""
SAMPLING_S = 0.05
POOL_ROOM = 1.1
"""The best pool is what was used, and this much room."""

T = TypeVar("T")


class Place(msgspec.Struct, frozen=True, kw_only=True):
    """Where the model would run."""

    name: str
    gpu: str
    """A name of the cost model, or a machine's file."""
    link: str
    gpu_memory_bytes: int
    host_pool_bytes: int
    """Most that the pool may be."""


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of requests answered in full, seconds."""

    ttft_s: Distribution
    tpot_s: Distribution


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """One way to run, with a pool or without."""

    kv_bytes: int
    steady_tokens_per_s: float
    """Saturated: all requests are there at once."""
    requests_per_s: float
    stall_share: float
    recomputed: int
    """Sequences that lost their KV and were computed again."""
    running_peak: int
    pooled_peak_bytes: int
    streamed_peak_bytes: int
    causes: dict[str, int]
    """How often the governor's reason was seen while somebody waited."""
    latency: Latency | None = None
    """At the rate of `Prediction.latency_requests_per_s`."""


class Prediction(msgspec.Struct, frozen=True, kw_only=True):
    """What `pie-async plan` says of one place."""

    place: Place
    model: str
    weight_bytes: int
    off: Outcome
    pooled: Outcome
    gain: float
    """Steady throughput with the pool over that without."""
    gain_bound: float
    """The most that streaming brings iterations that only decode, on the roofline."""
    best_pool_bytes: int
    """0: pooling does not pay."""
    limit: str
    """What keeps it from being faster, in words."""
    latency_requests_per_s: float


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of it."""

    items: tuple[WorkItem, ...]
    requests_per_s: float | None
    """For latencies; None: `LATENCY_LOAD` of what saturates it without a pool."""
    max_running: int
    seed: int
    arrive: Callable[[Sequence[WorkItem], float], list[WorkItem]]


Run = Callable[[Awaitable[T]], T]


async def predict(
    model: str, shape: ModelShape, place: Place, load: Load, *, weight_bytes: int
) -> Prediction:
    """Simulate four runs; must be awaited on a virtual clock.

    Raises:
        ConfigError: the weights leave no room for KV there.
    """
    gpu, link = gpu_named(place.gpu, option="gpu"), link_named(place.link, option="link")
    kv_bytes = place.gpu_memory_bytes - WORK_BYTES - weight_bytes
    if kv_bytes < GIB // 4:
        raise ConfigError(
            f"{format_size(weight_bytes)} of weights and {format_size(WORK_BYTES)} for the rest "
            f"leave {format_size(max(0, kv_bytes))} of {format_size(place.gpu_memory_bytes)} for "
            f"KV on {place.name}; raise --gpu-memory or take a smaller model",
            option="gpu_memory",
        )
    most_streamed = _most_streamed(link, kv_bytes)
    ring_bytes = int(RING_SHARE * min(most_streamed, place.host_pool_bytes))
    configs = [
        _config(model, place, load, kv_bytes, pool_bytes=0, most_streamed=most_streamed),
        _config(
            model, place, load, kv_bytes - ring_bytes,
            pool_bytes=place.host_pool_bytes, most_streamed=most_streamed,
        ),
    ]  # fmt: skip
    off, pooled = [await _saturated(config, load.items) for config in configs]
    mean_outputs = sum(item.output_tokens for item in load.items) / len(load.items)
    rate = load.requests_per_s or LATENCY_LOAD * off.steady_tokens_per_s / mean_outputs
    arriving = load.arrive(load.items, rate)
    off, pooled = [
        msgspec.structs.replace(outcome, latency=await _latency(config, arriving))
        for config, outcome in zip(configs, (off, pooled), strict=True)
    ]
    gain = pooled.steady_tokens_per_s / off.steady_tokens_per_s
    bound = pooling_bound(
        shape.weight_bytes, kv_bytes - ring_bytes, link.bytes_per_s / gpu.hbm_bytes_per_s
    )
    pays = gain > 1 and pooled.pooled_peak_bytes > 0
    return Prediction(
        place=place,
        model=model,
        weight_bytes=weight_bytes,
        off=off,
        pooled=pooled,
        gain=gain,
        gain_bound=bound.throughput_gain,
        best_pool_bytes=_rounded(pooled.pooled_peak_bytes * POOL_ROOM) if pays else 0,
        limit=_limit(off, pooled, load, most_streamed),
        latency_requests_per_s=rate,
    )


def _most_streamed(link: Link, kv_bytes: int) -> int:
    """In an iteration; where KV is little, no more than leaves half of it beside the ring."""
    is_near = link.bytes_per_s > NEAR_BYTES_PER_S
    return min(PEER_MAX_STREAMED_BYTES if is_near else MAX_STREAMED_BYTES, 2 * kv_bytes)


def _config(
    model: str, place: Place, load: Load, kv_bytes: int, *, pool_bytes: int, most_streamed: int
) -> EngineConfig:
    return EngineConfig(
        model=model,
        device="sim",
        sim_gpu=place.gpu,
        sim_link=place.link,
        device_kv_bytes=kv_bytes,
        host_pool_bytes=pool_bytes,
        max_streamed_bytes=most_streamed if pool_bytes else None,
        max_running_sequences=load.max_running,
        token_budget=2048,
        max_queued_requests=max(4096, len(load.items)),
        max_queued_tokens=2**40,
        seed=load.seed,
    )


async def _saturated(config: EngineConfig, items: Sequence[WorkItem]) -> Outcome:
    at_once = [msgspec.structs.replace(item, arrival_s=0.0) for item in items]
    times, last, watch = await _run(config, at_once)
    took_s = max(each.finished_s or 0.0 for each in times) - min(t.submitted_s for t in times)
    return Outcome(
        kv_bytes=config.device_kv_bytes or 0,
        steady_tokens_per_s=steady_tokens_per_s(times),
        requests_per_s=len(times) / took_s,
        stall_share=last.stall_share,
        recomputed=last.preemptions_recomputed,
        running_peak=watch.running,
        pooled_peak_bytes=watch.pooled * last.block_bytes,
        streamed_peak_bytes=watch.streamed * last.block_bytes,
        causes=dict(watch.causes),
    )


async def _latency(config: EngineConfig, items: Sequence[WorkItem]) -> Latency:
    times, _, _ = await _run(config, items)
    ttft_s = Distribution.of(each.ttft_s for each in times)
    tpot_s = Distribution.of(each.tpot_s or 0.0 for each in times)
    assert ttft_s is not None and tpot_s is not None
    return Latency(ttft_s=ttft_s, tpot_s=tpot_s)


class _Watch:
    """Peaks of a run, and what the governor said while somebody waited."""

    def __init__(self) -> None:
        self.running = self.pooled = self.streamed = 0
        self.causes: Counter[str] = Counter()

    def see(self, stats: EngineStats) -> None:
        self.running = max(self.running, stats.running)
        self.streamed = max(self.streamed, stats.streamed_blocks)
        # Clean copies of resident blocks fill whatever there is; they are not needed.
        self.pooled = max(self.pooled, stats.streamed_blocks + stats.parked_blocks)
        if stats.waiting or stats.parked:
            self.causes[stats.governor_cause] += 1


async def _run(
    config: EngineConfig, items: Sequence[WorkItem]
) -> tuple[list[RequestTimes], EngineStats, _Watch]:
    from pie_async.engine import Engine

    watch, clock = _Watch(), asyncio.get_running_loop().time
    async with Engine(config) as engine:

        async def sample() -> None:
            while True:
                watch.see(engine.stats())
                await asyncio.sleep(SAMPLING_S)

        sampling = asyncio.create_task(sample())
        try:
            prompts = Prompts(vocab_size=engine.model.vocab_size, first_token=1, seed=config.seed)
            run = await put_load(EngineTarget(engine), items, prompts, clock=clock)
        finally:
            sampling.cancel()
        if failed := [each.error for each in run.requests if not each.is_complete]:
            raise ConfigError(f"a simulated request failed: {failed[0]}", option="workload")
        return run.requests, engine.stats(), watch


def steady_tokens_per_s(times: Sequence[RequestTimes]) -> float:
    """Output while neither its first nor its last quarter was produced; of one token, 0."""
    arrivals = sorted(at_s for each in times for at_s in each.token_s)
    if len(arrivals) < 2:
        return 0.0
    first, last = int(STEADY_FROM * len(arrivals)), int(STEADY_TO * (len(arrivals) - 1))
    took_s = arrivals[last] - arrivals[first]
    return (last - first) / took_s if took_s > 0 else 0.0


def _rounded(num_bytes: float) -> int:
    """Up to whole GiB, or 256 MiB where it is little."""
    unit = GIB if num_bytes > 4 * GIB else 256 * MIB
    return -(-int(num_bytes) // unit) * unit


def _limit(off: Outcome, pooled: Outcome, load: Load, most_streamed: int) -> str:
    if pooled.pooled_peak_bytes == 0:
        if off.running_peak >= min(load.max_running, len(load.items)):
            return "the batch, not memory: all KV fits on the device"
        return "the load: all KV fits on the device"
    if pooled.running_peak >= load.max_running:
        return "the batch: --max-running sequences run"
    if pooled.streamed_peak_bytes > 0.97 * most_streamed:
        return f"the staging ring: --max-streamed is {format_size(most_streamed)}"
    cause = max(pooled.causes, key=lambda name: pooled.causes[name], default="fits")
    return {
        "hiding": "the link: more would not hide behind compute",
        "cost": "the weights are small beside the KV: streaming would cost more than it brings",
        "demand": "the load: all that it wants is streamed",
        "stall": "the link: compute waits for copies",
    }.get(cause, "the load: what waits comes in as sequences end")
