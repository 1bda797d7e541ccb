"""Throughput and latency of one load under several ways to deal with too little KV memory.

    python -m scripts.paper.throughput --model qwen2.5-32b --kv 2GiB 4GiB 7GiB 12GiB

Every size of the device's KV memory is run in every mode: `off` (no pool: preemption
recomputes), `parking` (preempted sequences wait in the pool, nothing is streamed) and `pie`
(the governor decides what is streamed). All requests are there at once, or arrive at --rate.
Beside each row stands what the link leaves of streaming at best (`bound`).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from pie_async import Engine
from pie_async.cli.load import EngineTarget, Prompts, put_load
from pie_async.config import EngineConfig, parse_size
from pie_async.measurements import RequestTimes, percentile, summarize
from pie_async.metrics import EngineStats
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.workload import (
    LENGTH_MODELS,
    WorkItem,
    arrive_at_rate,
    clip,
    read_trace,
    sample_lengths,
)
from scripts.paper.results import RESULTS, Results, freeze, replot, thaw

MODES: Mapping[str, Mapping[str, Any]] = {
    "off": {"host_pool_bytes": 0},
    "parking": {"streamed_blocks": 0},
    "pie": {},
}
HBM_BYTES_PER_S = 4.2e12
FIRST_TOKEN = 10
STEADY_FROM, STEADY_TO = 0.25, 0.75
"""Of the output tokens: between them the steady throughput is measured, without the time in
which the batch fills and the one in which it runs dry."""


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One load in one mode."""

    model: str
    workload: str
    requests: int
    """Answered in full."""
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
    """From the pool to the device, all in all."""
    link_busy_share: float
    mean_streamed_blocks: float
    expansion_bound: float
    """Most that hides, as a factor of the device's KV: link times the iteration's time."""
    normalized_p50_s: float
    normalized_p99_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float


def main() -> None:
    """Run all modes, or draw what was measured."""
    given = _parser().parse_args()
    if given.plot_only:
        replot(given.name, given.results, Row, draw)
        return
    facts = {"seed": given.seed, "settings": given.set}
    results = Results(given.name, given.results, facts, draw)
    is_sim = given.device == "sim"
    make_loop = VirtualTimeLoop if is_sim else uvloop.new_event_loop
    with asyncio.Runner(loop_factory=make_loop) as runner:
        for kv in given.kv:
            for mode in given.modes:
                runner.run(_run(given, results, parse_size(kv, option="--kv"), mode))
    results.finish()


async def _run(given: argparse.Namespace, results: Results, kv_bytes: int, mode: str) -> None:
    config = _config(given, kv_bytes, mode)
    began_s = time.perf_counter()
    async with Engine(config) as engine:
        freeze()
        print(f"[{mode}: started in {time.perf_counter() - began_s:.1f} s]", flush=True)
        fill = Prompts(vocab_size=engine.model.vocab_size, first_token=FIRST_TOKEN, seed=given.seed)
        await put_load(
            EngineTarget(engine), [WorkItem(prompt_tokens=64, output_tokens=8)] * 8, fill
        )
        items = [clip(item, engine.model.max_model_len) for item in _items(given)]
        before = engine.stats()
        streamed = _Streamed(engine)
        load = _Load(engine, items, fill)
        await load.run(given.seconds)
        mean_streamed = streamed.stop()
        spent = _spent(engine.stats(), before)
    results.add(_row(given, kv_bytes, mode, load, spent, mean_streamed))
    thaw()


class _Load:
    """Requests as clients see them; those that a limit in time cut off count their tokens only."""

    def __init__(self, engine: Engine, items: Sequence[WorkItem], fill: Prompts) -> None:
        self._target = EngineTarget(engine)
        self._items = items
        self._fill = fill
        # Virtual on the simulated device; else uvloop's own is coarse, so not the loop's.
        is_sim = engine.config.device == "sim"
        self._clock = asyncio.get_running_loop().time if is_sim else time.perf_counter
        self.requests: list[RequestTimes] = []
        self.duration_s = 0.0
        self.began_s = 0.0

    async def run(self, limit_s: float | None) -> None:
        """Send every request at its time, until all are answered or time is up."""
        prompts = [self._fill.of(item, number) for number, item in enumerate(self._items)]
        self.began_s = self._clock()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s), asyncio.TaskGroup() as group:
                for item, prompt in zip(self._items, prompts, strict=True):
                    group.create_task(self._one(item, prompt))
        self.duration_s = self._clock() - self.began_s

    async def _one(self, item: WorkItem, prompt: list[int]) -> None:
        await asyncio.sleep(max(0.0, self.began_s + item.arrival_s - self._clock()))
        times = RequestTimes(submitted_s=self._clock(), prompt_tokens=len(prompt))
        self.requests.append(times)
        stream = self._target.stream(prompt, output_tokens=item.output_tokens)
        async with contextlib.aclosing(stream):
            async for count in stream:
                times.arrived(self._clock(), count)
        times.finished_s = self._clock()


class _Streamed:
    """Samples how many blocks are streamed."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._seen: list[int] = []
        self._task = asyncio.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            self._seen.append(self._engine.stats().streamed_blocks)
            await asyncio.sleep(0.1)

    def stop(self) -> float:
        self._task.cancel()
        return sum(self._seen) / max(1, len(self._seen))


def _row(
    given: argparse.Namespace,
    kv_bytes: int,
    mode: str,
    load: _Load,
    spent: EngineStats,
    mean_streamed: float,
) -> Row:
    iterations = max(1, spent.iterations)
    mean_s = (spent.compute_s + spent.stall_s) / iterations
    link = spent.h2d_bytes / spent.h2d_busy_s if spent.h2d_busy_s else 0.0
    summary = summarize(load.requests, duration_s=load.duration_s)
    done = [request for request in load.requests if request.is_complete]
    normalized = sorted(request.e2e_s / max(1, request.output_tokens) for request in done)
    return Row(
        model=given.model,
        workload=given.workload,
        requests=len(done),
        requests_per_s=given.rate or 0.0,
        kv_bytes=kv_bytes,
        mode=mode,
        output_tokens_per_s=sum(r.output_tokens for r in load.requests) / load.duration_s,
        steady_tokens_per_s=_steady(load),
        duration_s=summary.duration_s,
        iterations=iterations,
        mean_iteration_s=mean_s,
        compute_s=spent.compute_s,
        stall_share=spent.stall_share,
        prompt_tokens_computed=spent.prompt_tokens,
        preemptions_parked=spent.preemptions_parked,
        preemptions_recomputed=spent.preemptions_recomputed,
        streamed_bytes=spent.h2d_bytes,
        link_busy_share=spent.h2d_busy_s / summary.duration_s,
        mean_streamed_blocks=mean_streamed,
        expansion_bound=1 + link * mean_s / kv_bytes,
        normalized_p50_s=percentile(normalized, 50) if normalized else 0.0,
        normalized_p99_s=percentile(normalized, 99) if normalized else 0.0,
        ttft_p50_s=summary.ttft_s.p50 if summary.ttft_s else 0.0,
        ttft_p99_s=summary.ttft_s.p99 if summary.ttft_s else 0.0,
        tpot_p50_s=summary.tpot_s.p50 if summary.tpot_s else 0.0,
        tpot_p99_s=summary.tpot_s.p99 if summary.tpot_s else 0.0,
    )


def _steady(load: _Load) -> float:
    """Output tokens per second between the shares of the output; see `STEADY_FROM`."""
    times_s = sorted(time_s for request in load.requests for time_s in request.token_s)
    first, last = int(STEADY_FROM * len(times_s)), int(STEADY_TO * len(times_s))
    if last - first < 2:
        return 0.0
    return (last - first) / max(1e-9, times_s[last] - times_s[first])


def _spent(last: EngineStats, first: EngineStats) -> EngineStats:
    names = (
        "iterations", "compute_s", "stall_s", "h2d_bytes", "h2d_busy_s", "prompt_tokens",
        "preemptions_parked", "preemptions_recomputed",
    )  # fmt: skip
    return EngineStats(**{name: getattr(last, name) - getattr(first, name) for name in names})


def _items(given: argparse.Namespace) -> list[WorkItem]:
    if given.workload in LENGTH_MODELS:
        items = sample_lengths(
            LENGTH_MODELS[given.workload],
            num_requests=given.requests,
            context_tokens=given.context,
            seed=given.seed,
        )
    else:
        items = read_trace(Path(given.workload), limit=given.requests)
        items = [msgspec.structs.replace(clip(item, given.context), arrival_s=0) for item in items]
    if given.rate:
        items = arrive_at_rate(items, requests_per_s=given.rate, seed=given.seed)
    return items


def draw(figure: Any, rows: Sequence[Row]) -> None:
    """Steady throughput over KV memory, a line per mode."""
    axes = figure.subplots()
    for mode in dict.fromkeys(row.mode for row in rows):
        line = [row for row in rows if row.mode == mode]
        sizes = [row.kv_bytes / 2**30 for row in line]
        axes.plot(sizes, [row.steady_tokens_per_s for row in line], "o-", label=mode)
    axes.set_xlabel("KV memory on the device, GiB")
    axes.set_ylabel("output tokens/s while the batch is full")
    axes.set_title(f"{rows[0].model} (random weights), {rows[0].workload}")
    axes.grid(alpha=0.3)
    axes.legend()


def _config(given: argparse.Namespace, kv_bytes: int, mode: str) -> EngineConfig:
    fields: dict[str, Any] = {
        "model": given.model,
        "device": given.device,
        "load_format": given.load_format,
        "device_kv_bytes": kv_bytes,
        "host_pool_bytes": parse_size(given.host_pool, option="--host-pool"),
        "prefix_caching": False,
        **MODES[mode],
    }
    for setting in given.set:
        name, _, value = setting.partition("=")
        fields[name] = msgspec.json.decode(value)
    return EngineConfig(**fields)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="qwen2.5-32b")
    add("--device", default="cuda")
    add("--load-format", default="random")
    add("--kv", nargs="+", default=["2GiB", "4GiB", "7GiB", "12GiB"])
    add("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    add("--workload", default="sharegpt-like", help="or the Azure trace's CSV file")
    add("--requests", type=int, default=300)
    add("--rate", type=float, help="requests/s; all at once without it")
    add("--seconds", type=float, help="cut the run off; without it all requests are answered")
    add("--context", type=int, default=4096, help="longer requests are cut to it")
    add("--host-pool", default="32GiB")
    add("--set", action="append", default=[], metavar="NAME=JSON", help="any engine option")
    add("--seed", type=int, default=0)
    add("--name", default="throughput", help="of the files under --results")
    add("--results", type=Path, default=RESULTS)
    add("--plot-only", action="store_true", help="draw what --results holds")
    return parser


if __name__ == "__main__":
    main()
