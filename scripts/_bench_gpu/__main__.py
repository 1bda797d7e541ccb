"""`scripts/bench_gpu`: peers first, then all rows on one engine, then kernels alone."""

from __future__ import annotations

import asyncio
import datetime
import gc
import platform
import statistics
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import torch
import uvloop

from pie_async import Engine, SamplingParams, __version__
from pie_async.assembly.loading import read_model
from pie_async.assembly.sizing import compute_dtype
from scripts._bench_gpu.engine_rows import EngineRows
from scripts._bench_gpu.kernel_rows import kernel_rows
from scripts._bench_gpu.options import PEER_ROWS, Options, parse
from scripts._bench_gpu.peer_rows import Peers, measured_peers
from scripts._bench_gpu.rates import dense_flops_per_s
from scripts._bench_gpu.roofline import Roofline, shape_of
from scripts._bench_gpu.rows import Row
from scripts._bench_gpu.table import show, tell, write

START_TARGET_S = 20.0
FIRST_PROMPT_TOKENS = 16
MEAN_TARGET = 1.1


class Bench:
    """What is measured so far."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.rows: list[Row] = []
        self.facts: dict[str, Any] = {
            "version": __version__,
            "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
            "torch": str(torch.__version__),
            "python": platform.python_version(),
            "engine": msgspec.to_builtins(options.engine),
            "scale": options.scale,
            "peers": {},
        }

    def add(self, row: Row) -> None:
        self.rows.append(row)
        tell(row)
        self.save()

    def keep_peers(self, peers: Peers) -> None:
        self.facts["peers"] = peers
        self.save()

    def save(self) -> None:
        if self.options.out is not None:
            write(self.options.out, self.rows, self.facts)

    async def add_all(self, name: str, rows: AsyncIterator[Row]) -> None:
        """A row that cannot be measured must not cost the others their time on the card."""
        began_s = time.perf_counter()
        try:
            async for row in rows:
                self.add(row)
        except Exception as error:
            reason = f"{type(error).__name__}: {error}"
            self.add(Row(group=name, name=name, kind="time", unit="s", note=reason))
        print(f"[{name}: {time.perf_counter() - began_s:.1f} s]", flush=True)


def main() -> None:
    """Measure, show, write."""
    options = parse()
    bench = Bench(options)
    peers = measured_peers(options, bench.keep_peers)
    bench.keep_peers(peers)
    roofline = _roofline(options)
    bench.facts["dense_flops_per_s"] = roofline.flops_per_s
    bench.facts["machine"] = _machine(options)
    if any(row != "attention" for row in options.rows):
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_on_engine(bench, roofline, peers))
    if "attention" in options.rows:
        for row in kernel_rows(options, roofline):
            bench.add(row)
    if (mean := _mean_against_vllm(bench.rows)) is not None:
        bench.add(mean)
    machine = bench.facts["machine"]
    show(bench.rows, title=f"{options.engine.model} on {machine}, {bench.facts['date']}")


async def _on_engine(bench: Bench, roofline: Roofline, peers: Peers) -> None:
    options = bench.options
    engine = Engine(options.engine)
    began_s = time.perf_counter()
    await engine.start()
    loaded_s = time.perf_counter() - began_s
    # As the commands do: a collection of everything that was loaded stops the loop for 0.15 s.
    gc.collect()
    gc.freeze()
    try:
        await _first_token(engine)
        if "start" in options.rows:
            bench.add(
                Row(
                    group="start", name="engine start to first token, weights included",
                    kind="time", unit="s", measured=time.perf_counter() - began_s,
                    target=START_TARGET_S, details={"started_s": loaded_s},
                )
            )  # fmt: skip
        memory = engine.gpu_memory()
        if memory is not None:
            print(*memory.lines(), sep="\n", flush=True)
            bench.facts["memory"] = msgspec.to_builtins(memory)
        rows = EngineRows(options, engine, roofline, peers)
        await rows.warm_up()
        for name in rows.names:
            if name in options.rows:
                await bench.add_all(name, rows.measure(name))
    finally:
        gc.unfreeze()
        await engine.aclose()


async def _first_token(engine: Engine) -> None:
    params = SamplingParams(max_tokens=1, temperature=0.0)
    async for _ in engine.generate(list(range(10, 10 + FIRST_PROMPT_TOKENS)), params):
        pass


def _roofline(options: Options) -> Roofline:
    config = options.engine
    dtype = compute_dtype(config, read_model(config)[1].dtype)
    return Roofline(
        shape=shape_of(config, dtype),
        read_bytes_per_s=options.read_bytes_per_s,
        flops_per_s=dense_flops_per_s(config.device, getattr(torch, dtype)),
    )


def _machine(options: Options) -> str:
    if options.engine.device == "cuda":
        return torch.cuda.get_device_name()
    return platform.processor() or platform.machine()


def _mean_against_vllm(rows: list[Row]) -> Row | None:
    """The throughput rows together; None without a peer."""
    groups = [group for group in PEER_ROWS if group != "rate"]
    ratios = [row.ratio for row in rows if row.group in groups and row.ratio is not None]
    if not ratios:
        return None
    return Row(
        group="mean", name=f"output tokens/s, mean of {len(ratios)} ratios", kind="rate", unit="x",
        measured=statistics.fmean(ratios), against=1.0, against_name="vLLM", target=MEAN_TARGET,
    )  # fmt: skip


if __name__ == "__main__":
    main()
