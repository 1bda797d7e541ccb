"""What guided sequences cost the others: the time between tokens with none, a tenth and all guided.

    python scripts/bench_guides.py [--device sim] [--sequences 64] [--tokens 256] [--rounds 1]

On the simulated device time is virtual: masks take 50 us each, the host's own work nothing. On the
others it is real. Rounds take turns; their medians are reported, and what part of the time compute
stood still because masks were not made.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
from itertools import pairwise
from typing import Any, NamedTuple

from pie_async import Engine, SamplingParams, StructuredOutputs
from pie_async.config import GIB, parse_size
from pie_async.measurements import percentile
from pie_async.testing import run_in_virtual_time

SHARES = (0.0, 0.1, 1.0)
GUIDE = StructuredOutputs(regex="[a-z ,.]{4000,}")
"""An output may not end of itself."""
KV_BYTES = {"sim": 4 * GIB, "cpu": GIB // 4, "cuda": GIB}
"""Enough for all: the simulated model is Llama 3.1 8B, the others' the built-in one."""
PROMPT = "Enter a messenger, who speaks:\n"
WARM_TOKENS = 16
"""Of each sequence, in which the batch fills. Gaps count from when all have them until one ends."""


class Gaps(NamedTuple):
    """Between tokens, in milliseconds."""

    median_ms: float
    p99_ms: float

    @classmethod
    def of(cls, gaps_s: list[float]) -> Gaps:
        if not gaps_s:
            return cls(0.0, 0.0)
        ordered = sorted(gaps_s)
        return cls(1e3 * percentile(ordered, 50), 1e3 * percentile(ordered, 99))


async def times_of(engine: Engine, *, is_guided: bool, tokens: int, seed: int) -> list[float]:
    """When the tokens of one sequence came, seconds."""
    params = SamplingParams(
        max_tokens=tokens,
        ignore_eos=True,
        seed=seed,
        output_kind="delta",
        structured_outputs=GUIDE if is_guided else None,
    )
    clock = asyncio.get_running_loop().time
    came_s = []
    async for output in engine.generate(PROMPT, params):
        came_s += [clock()] * sum(len(choice.token_ids) for choice in output.outputs)
    return came_s


async def neighbours(
    engine: Engine, *, share: float, sequences: int, tokens: int
) -> tuple[Gaps, Gaps]:
    """Of the sequences without a guide, then of those with one; either may be missing."""
    guided = [number < share * sequences for number in range(sequences)]
    async with asyncio.TaskGroup() as group:
        reads = [
            group.create_task(times_of(engine, is_guided=each, tokens=tokens, seed=number))
            for number, each in enumerate(guided)
        ]
    times = [read.result() for read in reads]
    begin_s, end_s = max(each[WARM_TOKENS] for each in times), min(each[-1] for each in times)
    gaps_s: dict[bool, list[float]] = {False: [], True: []}
    for is_guided, came_s in zip(guided, times, strict=True):
        counted = [at_s for at_s in came_s if begin_s <= at_s <= end_s]
        gaps_s[is_guided] += [later - sooner for sooner, later in pairwise(counted)]
    return Gaps.of(gaps_s[False]), Gaps.of(gaps_s[True])


class Seen(NamedTuple):
    """Of one share of guided sequences."""

    others: Gaps
    guided: Gaps
    mask_wait_share: float
    """Of the time, 0 to 1."""

    @classmethod
    def median(cls, rounds: list[Seen]) -> Seen:
        others, guided, shares = zip(*rounds, strict=True)
        return cls(_median(others), _median(guided), statistics.median(shares))


async def measure(
    *, sequences: int, tokens: int, rounds: int = 1, **options: Any
) -> dict[float, Seen]:
    """By share of guided sequences; medians over the rounds."""
    found: dict[float, list[Seen]] = {share: [] for share in SHARES}
    async with Engine(max_running_sequences=sequences, **options) as engine:
        await neighbours(engine, share=0.5, sequences=sequences, tokens=WARM_TOKENS + 2)
        for _ in range(rounds):
            for share, rows in found.items():
                before = engine.stats()
                gaps = await neighbours(engine, share=share, sequences=sequences, tokens=tokens)
                after = engine.stats()
                waited_s = after.mask_wait_s - before.mask_wait_s
                rows.append(Seen(*gaps, waited_s / (after.uptime_s - before.uptime_s)))
    return {share: Seen.median(rows) for share, rows in found.items()}


def _median(rounds: tuple[Gaps, ...]) -> Gaps:
    return Gaps(*map(statistics.median, zip(*rounds, strict=True)))


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--device", choices=KV_BYTES, default="sim")
    parser.add_argument("--model", help="left out: the one that KV_BYTES is for")
    parser.add_argument("--load-format", help="random: a directory's config and tokenizer will do")
    parser.add_argument("--kv", help="device memory for KV, 4GiB say; left out: KV_BYTES")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=1)
    given = parser.parse_args()
    kv_bytes = parse_size(given.kv, option="--kv") if given.kv else KV_BYTES[given.device]
    options: dict[str, Any] = {"device": given.device, "device_kv_bytes": kv_bytes}
    if given.model is not None:
        options["model"] = given.model
    if given.load_format is not None:
        options["load_format"] = given.load_format
    run = measure(sequences=given.sequences, tokens=given.tokens, rounds=given.rounds, **options)
    found = run_in_virtual_time(run) if given.device == "sim" else asyncio.run(run)
    print("guided  neighbours, ms: median, p99   guided ones: median, p99   waited for masks")
    for share, seen in found.items():
        told = "".join(
            f"{gaps.median_ms:17.2f} {gaps.p99_ms:9.2f}" for gaps in (seen.others, seen.guided)
        )
        print(f"{share:6.0%}{told}{seen.mask_wait_share:19.1%}")


if __name__ == "__main__":
    main()
