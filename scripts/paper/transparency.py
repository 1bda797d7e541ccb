r"""Transparency: how long an iteration takes while so much KV is streamed (Pie, section 6.2).

    python -m scripts.paper.transparency --model llama-3.1-8b --batch 64 --context 1024
    python -m scripts.paper.transparency --device sim --gpu gh200 --set 'sim_link="nvlink-c2c"' \
        --kv 40GiB --host-pool 16GiB

One batch decodes all the time. Streaming is fixed to one share after another of what the link
moves during an iteration with everything resident; between two shares nothing is streamed, and
those windows, of nearly the same context, are what the one between them is compared with. All
KV would fit on the device, so that nothing else differs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec

from pie_async import Engine, SamplingParams
from pie_async.cli.load import clock_of
from pie_async.config import format_size, parse_size
from pie_async.device.cost_model import gpu_named
from pie_async.metrics import EngineStats
from pie_async.request_stream import RequestStream
from scripts._bench_gpu.breakdown import Breakdown, profiled
from scripts._bench_gpu.host_time import HostTime
from scripts.paper.load import spent_between
from scripts.paper.options import Budget, add_budget, engine_config, loop_of, parser_of
from scripts.paper.progress import Progress
from scripts.paper.results import Results, freeze, replot, thaw

SHARES = (0.2, 0.4, 0.6, 0.8, 0.95, 1.1)
SETTLING_ITERATIONS = 10
"""After a change: graphs are captured, the pipeline of two iterations runs full again."""
PROBE_BLOCKS = 48
"""Streamed to learn the link's rate."""
PATIENCE_ITERATIONS = 400
FIRST_TOKEN = 10
PROFILED_ITERATIONS = 20
ALL_MUST_FIT = (
    "all must fit, or something else is measured. Raise --kv, or lower --batch, --context, "
    "--iterations or the number of --shares"
)


class Point(msgspec.Struct, frozen=True, kw_only=True):
    """One window with so much streamed."""

    model: str
    batch: int
    context: int
    layer_group: int
    ring_depth: int
    link_share: float
    """Of what the link can move in `resident_s`."""
    streamed_bytes: int
    """Per iteration."""
    iteration_s: float
    """Median; as a client sees it, token to token."""
    resident_s: float
    """The same, of the windows before and after in which nothing was streamed."""
    ratio: float
    bound_ratio: float
    """What physics leaves: the copies' writes take their part of the memory's rate, and no
    iteration is shorter than its copies."""
    stall_share: float
    link_busy_share: float
    link_bytes_per_s: float
    compute_s: float
    """Mean time that the compute stream worked in an iteration."""
    resident_compute_s: float
    launch_s: float
    """Processor time of the launch thread in an iteration."""


class Window(NamedTuple):
    """What was seen of some iterations in a row."""

    iteration_s: float
    stats: EngineStats
    """Totals of the window."""
    wall_s: float
    launch_s: float
    """Processor time of the launch thread."""

    @property
    def compute_s(self) -> float:
        """By iteration."""
        return self.stats.compute_s / max(1, self.stats.iterations)


def main() -> None:
    """Measure every batch, or draw what was measured."""
    given = _parser().parse_args()
    if given.plot_only:
        replot(given.name, given.results, Point, draw)
        return
    facts = {"seed": given.seed, "iterations": given.iterations, "settings": given.set}
    results = Results(given.name, given.results, facts, draw)
    budget = Budget(given.budget)
    progress = Progress(len(given.batch) * (1 + len(given.shares)))
    with loop_of(given) as runner:
        for batch, context in zip(given.batch, given.context, strict=True):
            if budget.allows(f"batch {batch}"):
                runner.run(_measure(given, results, progress, batch, context))
    budget.tell()
    results.finish()


async def _measure(
    given: argparse.Namespace, results: Results, progress: Progress, batch: int, context: int
) -> None:
    kv_bytes = None if given.kv is None else parse_size(given.kv, option="--kv")
    fields: dict[str, Any] = {"max_running_sequences": batch, "streamed_blocks": 0}
    if given.device == "sim":
        fields["sim_gpu"] = given.gpu
    async with Engine(engine_config(given, kv_bytes, **fields)) as engine:
        _check_room(given, engine, batch, context)
        freeze()
        async with aclosing(_Batch(engine, batch, context, given.seed)) as running:
            progress.begin(f"batch {batch}, nothing streamed")
            await running.start()
            async for point in _points(running, given, progress, batch, context):
                results.add(point)
    thaw()


def _check_room(given: argparse.Namespace, engine: Engine, batch: int, context: int) -> None:
    """SystemExit where the batch would outgrow the device's memory before the last window."""
    windows = 2 + 2 * len(given.shares)
    tokens = context + windows * (SETTLING_ITERATIONS + given.iterations)
    if given.profile:
        tokens += (1 + len(given.shares)) * PROFILED_ITERATIONS
    layout = engine.layout
    needed, there = batch * -(-tokens // layout.block_tokens), engine.stats().device_blocks
    if needed > there:
        raise SystemExit(
            f"--batch {batch} --context {context}: by the last window sequences of {tokens} tokens "
            f"take {format_size(needed * layout.block_bytes)} of KV, and the device has "
            f"{format_size(there * layout.block_bytes)}; {ALL_MUST_FIT}"
        )


async def _points(
    running: _Batch, given: argparse.Namespace, progress: Progress, batch: int, context: int
) -> AsyncIterator[Point]:
    engine = running.engine
    layout = engine.layout
    iterations = given.iterations
    block_bytes = layout.block_bytes
    await running.stream(PROBE_BLOCKS)
    probe = await running.window(iterations)
    link = probe.stats.h2d_bytes / probe.stats.h2d_busy_s
    memory = gpu_named(given.gpu).hbm_bytes_per_s
    await running.stream(0)
    before = await running.window(iterations)
    if given.profile:
        await _profile(running, "resident")
    for share in given.shares:
        blocks = max(1, round(share * link * before.iteration_s / block_bytes))
        progress.begin(f"batch {batch}, {share:.0%} of the link")
        await running.stream(blocks)
        seen = await running.window(iterations)
        if given.profile:
            await _profile(running, f"{blocks} blocks streamed")
        await running.stream(0)
        after = await running.window(iterations)
        resident_s = (before.iteration_s + after.iteration_s) / 2
        streamed_bytes = blocks * block_bytes
        bound_s = max(resident_s + streamed_bytes / memory, streamed_bytes / link)
        yield Point(
            model=engine.config.model,
            batch=batch,
            context=context,
            layer_group=layout.largest_group,
            ring_depth=layout.ring_depth,
            link_share=streamed_bytes / link / resident_s,
            streamed_bytes=streamed_bytes,
            iteration_s=seen.iteration_s,
            resident_s=resident_s,
            ratio=seen.iteration_s / resident_s,
            bound_ratio=bound_s / resident_s,
            stall_share=seen.stats.stall_share,
            link_busy_share=seen.stats.h2d_busy_s / seen.wall_s,
            link_bytes_per_s=seen.stats.h2d_bytes / seen.stats.h2d_busy_s,
            compute_s=seen.compute_s,
            resident_compute_s=(before.compute_s + after.compute_s) / 2,
            launch_s=seen.launch_s / max(1, seen.stats.iterations),
        )
        before = after


class _Batch:
    """Sequences that decode together; the first, which is parked last, is read token by token."""

    def __init__(self, engine: Engine, batch: int, context: int, seed: int) -> None:
        self.engine = engine
        self._size = batch
        self._context = context
        self._seed = seed
        self._clock = clock_of(engine.config)
        self._streams: list[RequestStream] = []

    async def start(self) -> None:
        """Return once all of them decode."""
        vocab = self.engine.model.vocab_size - FIRST_TOKEN
        params = SamplingParams(
            max_tokens=self.engine.model.max_model_len - self._context,
            temperature=0.0,
            ignore_eos=True,
            output_kind="final",
        )
        for number in range(self._size):
            prompt = [
                FIRST_TOKEN + (self._seed * 7919 + number * 104729 + i * 31) % vocab
                for i in range(self._context)
            ]
            how = params if number else msgspec.structs.replace(params, output_kind="delta")
            self._streams.append(await self.engine.submit(prompt, how))
        needed = self._size * self._context
        await self._until(lambda: self.engine.stats().prompt_tokens >= needed)
        await self.window(SETTLING_ITERATIONS)

    async def stream(self, blocks: int) -> None:
        """Stream exactly so many from now on, and return once it is so."""
        await self.engine.fix_streaming(blocks, least_blocks=blocks)
        await self._until(lambda: self._is_streaming(blocks))
        await self.window(SETTLING_ITERATIONS)

    def _is_streaming(self, blocks: int) -> bool:
        stats = self.engine.stats()
        return stats.streamed_blocks == blocks and stats.running == self._size

    async def _until(self, is_so: Any) -> None:
        for _ in range(PATIENCE_ITERATIONS):
            if is_so():
                return
            await self._token()
        self._check_all_run()
        raise RuntimeError(f"this never came about: {self.engine.stats()}")

    def _check_all_run(self) -> None:
        """SystemExit if one is parked; while the number of streamed blocks changes one may be."""
        if (running := self.engine.stats().running) < self._size:
            raise SystemExit(
                f"{self._size - running} of {self._size} sequences are parked: blocks that begin "
                f"or cease to be streamed take iterations of their own; {ALL_MUST_FIT}"
            )

    async def window(self, iterations: int) -> Window:
        """So many iterations from now."""
        first, host, began_s = self.engine.stats(), HostTime(), self._clock()
        gaps_s, last_s = [], began_s
        for _ in range(iterations):
            count = await self._token()
            now_s = self._clock()
            gaps_s += [(now_s - last_s) / count] * count
            last_s = now_s
        self._check_all_run()
        return Window(
            statistics.median(gaps_s),
            spent_between(first, self.engine.stats()),
            last_s - began_s,
            host.by_thread_s().get("pie-launch", 0.0),
        )

    async def _token(self) -> int:
        output = await anext(self._streams[0])
        return max(1, sum(len(choice.token_ids) for choice in output.outputs))

    async def aclose(self) -> None:
        for stream in self._streams:
            stream.cancel()
        for stream in self._streams:
            async for _ in stream:
                pass


async def _profile(running: _Batch, what: str) -> None:
    """Say where the time goes: microseconds by iteration; copies run beside the rest."""
    found: list[Breakdown] = []
    with profiled(found):
        await running.window(PROFILED_ITERATIONS)
    seen = found[0]
    parts = {**seen.by_class_s, "idle": seen.idle_s, "in all": seen.window_s}
    told = (
        f"{name} {1e6 * seconds / PROFILED_ITERATIONS:.0f} us" for name, seconds in parts.items()
    )
    print(f"profiled, {what}: {', '.join(told)}", flush=True)


def draw(figure: Any, points: Sequence[Point]) -> None:
    """Iteration time against what is streamed, beside the bound; a line per batch."""
    axes = figure.subplots()
    kinds = dict.fromkeys(
        (point.model, point.batch, point.context, point.layer_group) for point in points
    )
    for model, batch, context, group in kinds:
        line = [
            point
            for point in points
            if (point.model, point.batch, point.context, point.layer_group)
            == (model, batch, context, group)
        ]
        shares = [100 * point.link_share for point in line]
        label = f"{model}, batch {batch} x {context}, groups of {group}"
        (drawn,) = axes.plot(shares, [point.ratio for point in line], "o-", label=label)
        bounds = [point.bound_ratio for point in line]
        axes.plot(shares, bounds, "--", color=drawn.get_color(), alpha=0.5)
    axes.set_xlabel("streamed per iteration, % of what the link moves (dashed: the bound)")
    axes.set_ylabel("iteration time / everything resident")
    axes.grid(alpha=0.3)
    axes.legend()


def _parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__, name="transparency")
    parser.set_defaults(model="llama-3.1-8b", host_pool="4GiB")
    add = parser.add_argument
    add("--gpu", default="h200", help="of the bound, and what is simulated")
    add("--batch", type=int, nargs="+", default=[64])
    add("--context", type=int, nargs="+", default=[1024], help="as many as batches")
    add("--shares", type=float, nargs="+", default=list(SHARES))
    add("--iterations", type=int, default=40, help="of a window")
    add("--kv", help="device memory for KV; default: what the card has left")
    add("--profile", action="store_true", help="say where the iterations' time goes")
    add_budget(parser)
    return parser


if __name__ == "__main__":
    main()
