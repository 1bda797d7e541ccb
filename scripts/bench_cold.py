"""What the first requests after a start meet: gaps between tokens, and times to first token.

    python scripts/bench_cold.py [--device cuda] [--rate 20] [--seconds 20] [--temperature 1]

Requests arrive as a Poisson process from the moment in which the engine says that it is ready,
with prompts of 30 to 400 tokens and answers of 50 to 300. What an engine compiles, captures or
tunes only once it is wanted shows here, and nowhere later.
"""

from __future__ import annotations

import argparse
import random
from itertools import pairwise

import uvloop

from pie_async import Engine
from pie_async.cli.load import EngineTarget, Prompts, put_load
from pie_async.config import EngineConfig, parse_size
from pie_async.measurements import RequestTimes, percentile
from pie_async.workload import WorkItem, arrive_at_rate

PROMPT_TOKENS, OUTPUT_TOKENS = (30, 400), (50, 300)
FIRST_TOKEN = 10
"""Those before it may be special."""
QUANTILES = (50, 90, 99, 99.9, 100)


async def measure(
    config: EngineConfig, *, rate: float, seconds: float, temperature: float, seed: int = 0
) -> list[RequestTimes]:
    """Of as many requests as come at this rate within so many seconds of the start."""
    draw = random.Random(seed)
    items = [
        WorkItem(
            prompt_tokens=draw.randrange(*PROMPT_TOKENS),
            output_tokens=draw.randrange(*OUTPUT_TOKENS),
        )
        for _ in range(round(rate * seconds))
    ]
    items = arrive_at_rate(items, requests_per_s=rate, seed=seed)
    async with Engine(config) as engine:
        target = EngineTarget(engine, temperature=temperature)
        prompts = Prompts(vocab_size=engine.model.vocab_size, first_token=FIRST_TOKEN, seed=seed)
        return (await put_load(target, items, prompts)).requests


def main() -> None:
    """Measure one start, and print quantiles in milliseconds."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--model", default="llama-3.1-8b")
    parser.add_argument("--load-format", default="random")
    parser.add_argument("--kv", default="8GiB", help="device memory for KV")
    parser.add_argument("--rate", type=float, default=20.0, help="requests/s")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--temperature", type=float, default=1.0)
    given = parser.parse_args()
    config = EngineConfig(
        model=given.model,
        device=given.device,
        load_format=given.load_format,
        device_kv_bytes=parse_size(given.kv, option="--kv"),
        host_pool_bytes=0,
    )
    how = {"rate": given.rate, "seconds": given.seconds, "temperature": given.temperature}
    requests = uvloop.run(measure(config, **how))
    gaps_s = [b - a for request in requests for a, b in pairwise(request.token_s)]
    print(f"{len(requests)} requests; ms at {', '.join(f'p{q:g}' for q in QUANTILES)}")
    for name, seen_s in (("gaps", gaps_s), ("TTFT", [each.ttft_s for each in requests])):
        found = (1e3 * percentile(sorted(seen_s), q) for q in QUANTILES)
        print(f"{name:5}", " ".join(f"{ms:8.2f}" for ms in found))


if __name__ == "__main__":
    main()
