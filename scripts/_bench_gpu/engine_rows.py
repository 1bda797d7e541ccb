"""The rows that are measured on a running engine, one after the other."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec

from pie_async import Engine
from pie_async.measurements import Distribution
from pie_async.workload import WorkItem, clip
from scripts._bench_gpu import loads, serving
from scripts._bench_gpu.breakdown import Breakdown, profiled
from scripts._bench_gpu.options import AT_SHARE, Options
from scripts._bench_gpu.peer_rows import Peers, saturating_rate
from scripts._bench_gpu.roofline import Roofline
from scripts._bench_gpu.rows import Row
from scripts._bench_gpu.steady import Steady, steady_decode

PROFILED_ITERATIONS = 20
_IDLE_TARGET, _HOST_TARGET = 0.02, 0.4
_LATENCIES = (
    ("ttft", "TTFT", 50),
    ("ttft", "TTFT", 99),
    ("tpot", "TPOT", 50),
    ("tpot", "TPOT", 99),
)


class EngineRows:
    """Measures rows by their names.

    Args:
        peers: vLLM's results under the same names; may be empty.
    """

    def __init__(self, options: Options, engine: Engine, roofline: Roofline, peers: Peers) -> None:
        self._options = options
        self._engine = engine
        self._roofline = roofline
        self._peers = peers
        self._seed = 100
        self._requests_per_s: float | None = None
        self._measures: dict[str, Callable[[], AsyncIterator[Row]]] = {
            "decode-1": lambda: self._decode("decode-1", 1, 1024, 0.85),
            "decode-64": lambda: self._decode("decode-64", 64, 1024, 0.85),
            "decode-256": lambda: self._decode("decode-256", 256, 512, 0.80),
            "prefill": self._prefill,
            "ttft": self._first_token,
            "throughput-64": lambda: self._throughput("throughput-64", 64, 1024, 128),
            "throughput-256": lambda: self._throughput("throughput-256", 256, 512, 128),
            "azure": self._azure,
            "rate": self._rate,
        }

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._measures)

    def measure(self, name: str) -> AsyncIterator[Row]:
        """The rows of one name, as they are done."""
        return self._measures[name]()

    async def warm_up(self) -> None:
        """Run everything once, so that no row pays for compiling."""
        items = [WorkItem(prompt_tokens=self._options.scaled(600), output_tokens=8)] * 8
        await serving.saturated(self._engine, items, seed=self._next_seed())

    # --- decode -----------------------------------------------------------------------------

    async def _decode(
        self, name: str, batch: int, context: int, target: float
    ) -> AsyncIterator[Row]:
        batch, context = self._options.scaled(batch), self._options.scaled(context)
        steady = await self._steady(batch, context, self._options.iterations)
        what = f"batch {batch}, context {context}"
        details = msgspec.to_builtins(steady)
        yield Row(
            group=name, name=f"decode iteration, {what}", kind="time", unit="ms",
            measured=steady.iteration_s, against=self._roofline.decode_s(batch, context),
            against_name="roofline", target=target, details=details,
        )  # fmt: skip
        yield Row(
            group=name, name=f"GPU idle share, {what}", kind="share", unit="%",
            measured=steady.idle_share, target=_IDLE_TARGET,
        )  # fmt: skip
        yield Row(
            group=name, name=f"host time by iteration, {what}", kind="share", unit="%",
            measured=steady.host_s / steady.mean_s, note=f"{steady.host_s * 1e3:.2f} ms",
            target=_HOST_TARGET if name == "decode-256" else None,
            details=steady.host_by_thread_s,
        )  # fmt: skip
        if self._options.profiles:
            async for row in self._profile(name, batch, context):
                yield row

    async def _steady(self, batch: int, context: int, iterations: int, **how: Any) -> Steady:
        # In the middle of the window the context is the one asked for.
        length = max(1, context - iterations // 2)
        prompts = self._prompts(batch, length)
        steady = await steady_decode(self._engine, prompts, iterations=iterations, **how)
        return msgspec.structs.replace(steady, context=context)

    async def _profile(self, name: str, batch: int, context: int) -> AsyncIterator[Row]:
        found: list[Breakdown] = []
        steady = await self._steady(batch, context, PROFILED_ITERATIONS, window=profiled(found))
        (seen,) = found
        if not seen.window_s:
            raise RuntimeError("the profiler saw no GPU work")
        parts = {**seen.by_class_s, "idle": seen.idle_s}
        for kind, seconds in parts.items():
            yield Row(
                group=name, name=f"  profiled, batch {batch}: {kind}", kind="time", unit="us",
                measured=steady.iteration_s * seconds / seen.window_s,
                note=f"{seconds / seen.window_s:.1%}",
                details=seen.top_kernels_s if kind == "idle" else {},
            )  # fmt: skip

    # --- prefill ----------------------------------------------------------------------------

    async def _prefill(self) -> AsyncIterator[Row]:
        batch, tokens = self._options.scaled(8), self._options.scaled(2048)
        walls_s = await self._repeated_prefill(batch, tokens)
        flops = self._roofline.prefill_flops(batch, tokens)
        yield Row(
            group="prefill", name=f"prefill of {batch} x {tokens} tokens", kind="rate",
            unit="TFLOP/s", measured=flops / serving.median(walls_s),
            against=self._roofline.flops_per_s, against_name="dense product", target=0.75,
            details={"walls_s": walls_s},
        )  # fmt: skip

    async def _first_token(self) -> AsyncIterator[Row]:
        tokens = min(self._options.scaled(8192), self._engine.model.max_model_len - 1)
        walls_s = await self._repeated_prefill(1, tokens)
        yield Row(
            group="ttft", name=f"TTFT at {tokens} tokens", kind="time", unit="ms",
            measured=serving.median(walls_s), against=self._roofline.prefill_s(1, tokens),
            against_name="roofline", target=1 / 1.15, details={"walls_s": walls_s},
        )  # fmt: skip

    async def _repeated_prefill(self, batch: int, tokens: int) -> list[float]:
        async def once(_: int) -> float:
            run = await serving.prefill(
                self._engine, batch=batch, tokens=tokens, seed=self._next_seed()
            )
            return run.wall_s

        await once(0)  # these shapes may be new to what is compiled or tuned
        return await serving.repeated(
            once, rounds=self._options.rounds + 2, seconds=self._options.seconds
        )

    # --- throughput and latency -------------------------------------------------------------

    async def _throughput(
        self, name: str, batch: int, prompt: int, output: int
    ) -> AsyncIterator[Row]:
        items = loads.equal(self._options, batch, prompt, output)
        runs: list[serving.Saturated] = []

        async def once(_: int) -> float:
            runs.append(await serving.saturated(self._engine, items, seed=self._next_seed()))
            return runs[-1].tokens_per_s

        rates = await serving.repeated(
            once, rounds=self._options.rounds, seconds=self._options.seconds
        )
        first = items[0]
        what = f"{len(items)} x {first.prompt_tokens}+{first.output_tokens}"
        yield self._against_vllm(name, what, serving.median(rates), runs)

    async def _azure(self) -> AsyncIterator[Row]:
        items = [self._fitting(item) for item in loads.at_once(self._options)]
        run = await serving.saturated(self._engine, items, seed=self._next_seed())
        self._requests_per_s = len(items) / run.duration_s
        what = f"{len(items)} requests of the trace at once"
        yield self._against_vllm("azure", what, run.tokens_per_s, [run])

    def _against_vllm(
        self, name: str, what: str, tokens_per_s: float, runs: list[serving.Saturated]
    ) -> Row:
        return Row(
            group=name, name=f"output tokens/s, {what}", kind="rate", unit="tok/s",
            measured=tokens_per_s, against=self._peers.get(name, {}).get("output_tokens_per_s"),
            against_name="vLLM", target=1.0, note=self._peers.get(name, {}).get("failure", ""),
            details={"runs": msgspec.to_builtins(runs)},
        )  # fmt: skip

    async def _rate(self) -> AsyncIterator[Row]:
        rate = saturating_rate(self._peers) or self._requests_per_s
        if rate is None:
            raise ValueError("the saturating rate is not known; run row azure too")
        rate *= AT_SHARE
        items = [self._fitting(item) for item in loads.at_rate(self._options, rate)]
        summary = await serving.at_rate(self._engine, items, seed=self._next_seed())
        details = msgspec.to_builtins(summary)
        for key, label, share in _LATENCIES:
            found: Distribution | None = getattr(summary, f"{key}_s")
            peer = self._peers.get("rate", {}).get(f"p{share}_{key}_ms")
            yield Row(
                group="rate", name=f"{label} p{share} at {rate:.2f} requests/s", kind="time",
                unit="ms", measured=getattr(found, f"p{share}") if found else None,
                against=None if peer is None else peer / 1e3, against_name="vLLM", target=1.0,
                note=f"{summary.failed} failed" if summary.failed else "", details=details,
            )  # fmt: skip
            details = {}

    # --- requests ---------------------------------------------------------------------------

    def _fitting(self, item: WorkItem) -> WorkItem:
        return clip(item, self._engine.model.max_model_len)

    def _prompts(self, batch: int, length: int) -> list[list[int]]:
        fill = serving.prompts_of(self._engine, self._next_seed())
        item = WorkItem(prompt_tokens=length, output_tokens=1)
        return [fill.of(item, number) for number in range(batch)]

    def _next_seed(self) -> int:
        """No two rows send the same prompts: nothing is found in a cache."""
        self._seed += 1
        return self._seed
