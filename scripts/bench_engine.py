"""What the engine itself costs: pooling at a quarter of the memory, pooling unused, actors.

    python scripts/bench_engine.py [--model DIR] [--rounds 9] [--json FILE]

Two ratios with a model on the CPU device, and a time on the simulated one:

- a device arena of a quarter of the need, against one that holds everything (same batch);
- everything resident with the pool switched on, against off;
- host time per iteration of the whole engine with 64 running sequences, with and without 64
  readers that take every token as it comes.

The variants of a ratio take turns within one run, each first in every other round; medians are
reported, and as a measure of the machine's noise the range.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from pathlib import Path
from typing import Any, NamedTuple

from pie_async import LLM, Engine, SamplingParams
from pie_async.config import GIB
from pie_async.outputs import RequestOutput
from pie_async.runtime.virtual_time import VirtualTimeLoop
from pie_async.sampling_params import OutputKind

BATCH = 16


class Load(NamedTuple):
    """What every sequence of the batch reads and writes."""

    prompt_tokens: int
    output_tokens: int


def generate(llm: LLM, load: Load) -> tuple[float, list[RequestOutput]]:
    """Output tokens per second of one saturated batch, and what came out."""
    prompts = [[100 + 7 * i + j for j in range(load.prompt_tokens)] for i in range(BATCH)]
    params = SamplingParams(temperature=0.0, max_tokens=load.output_tokens, ignore_eos=True)
    began_s = time.perf_counter()
    outputs = llm.generate(prompts, params, progress=False)
    return BATCH * load.output_tokens / (time.perf_counter() - began_s), outputs


def compare(
    name: str, load: Load, rounds: int, first: dict[str, Any], second: dict[str, Any]
) -> dict[str, Any]:
    """Alternate two configurations; the ratio of their rates, second over first."""
    with LLM(**first) as one, LLM(**second) as other:
        _, expected = generate(one, load)
        _, outputs = generate(other, load)
        for left, right in zip(expected, outputs, strict=True):
            if left.outputs[0].token_ids != right.outputs[0].token_ids:
                raise SystemExit(f"{name}: the two configurations generate different tokens")
        rates = []
        for number in range(rounds):
            if number % 2:
                later = generate(other, load)[0]
                rates.append((generate(one, load)[0], later))
            else:
                rates.append((generate(one, load)[0], generate(other, load)[0]))
        stats = other.stats()
    return {
        "measure": name,
        "first_tokens_per_s": statistics.median(rate for rate, _ in rates),
        "second_tokens_per_s": statistics.median(rate for _, rate in rates),
        "ratio": statistics.median(right / left for left, right in rates),
        "ratio_range": [min(r / f for f, r in rates), max(r / f for f, r in rates)],
        "stall_share": stats.stall_share,
        "staged_bytes": stats.h2d_bytes,
        "preemptions_parked": stats.preemptions_parked,
    }


def need_bytes(model: str, load: Load) -> int:
    """KV that the batch needs to be resident."""
    with LLM(model=model) as llm:
        stats = llm.stats()
    blocks = BATCH * -(-sum(load) // stats.block_tokens)
    return blocks * stats.block_bytes


def quarter_arena(model: str, load: Load, rounds: int) -> dict[str, Any]:
    need = need_bytes(model, load)
    return compare(
        "device arena 1/4 of the need",
        load,
        rounds,
        {"model": model, "device_kv_bytes": 2 * need, "host_pool_bytes": 2 * need},
        {"model": model, "device_kv_bytes": need // 4, "host_pool_bytes": 2 * need},
    )


def unused_pool(model: str, load: Load, rounds: int) -> dict[str, Any]:
    need = need_bytes(model, load)
    return compare(
        "pool switched on, everything resident",
        load,
        rounds,
        {"model": model, "device_kv_bytes": 2 * need, "host_pool_bytes": 0},
        {"model": model, "device_kv_bytes": 2 * need, "host_pool_bytes": 8 * need},
    )


def host_time(output_kind: OutputKind, host_pool_bytes: int) -> float:
    """Seconds of host CPU per iteration at 64 running sequences on the simulated device.

    Averaged over a whole run: about 30 iterations in which the prompts are computed, then 500
    in which all sequences decode.
    """

    async def measure() -> float:
        async with Engine(
            device="sim",
            device_kv_bytes=16 * GIB,
            host_pool_bytes=host_pool_bytes,
            max_running_sequences=64,
        ) as engine:

            async def read(number: int) -> None:
                params = SamplingParams(max_tokens=500, output_kind=output_kind)
                prompt = [number + i for i in range(256)]
                async for _ in engine.generate(prompt, params):
                    pass

            began_s = time.process_time()
            async with asyncio.TaskGroup() as readers:
                for number in range(64):
                    readers.create_task(read(number))
            return (time.process_time() - began_s) / engine.stats().iterations

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(measure())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin", help="a model directory")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--output-tokens", type=int, default=192)
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args()
    load = Load(options.prompt_tokens, options.output_tokens)
    rows = [
        quarter_arena(options.model, load, options.rounds),
        unused_pool(options.model, load, options.rounds),
    ]
    for row in rows:
        low, high = row["ratio_range"]
        print(f"{row['measure']:42} {row['ratio']:.3f} ({low:.3f} .. {high:.3f})")
    times: dict[str, float] = {}
    kinds: list[tuple[str, OutputKind, int]] = [
        ("actors alone", "final", 64 * GIB),
        ("actors alone, no pool", "final", 0),
        ("with 64 readers", "delta", 64 * GIB),
    ]
    for name, kind, pool_bytes in kinds:
        times[name] = statistics.median(host_time(kind, pool_bytes) for _ in range(options.rounds))
        print(f"host time per iteration, {name:22} {times[name] * 1e6:.0f} us")
    if options.json:
        options.json.write_text(json.dumps({"ratios": rows, "host_s": times}, indent=2))


if __name__ == "__main__":
    main()
