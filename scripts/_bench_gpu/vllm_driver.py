"""Runs all of the peer's rows on one vLLM engine, in a process that has vLLM on its path.

    python vllm_driver.py PLAN.json

The plan is what `peers.py` writes. Prints a line "RESULT {...}" for each load. Requests go
through vLLM's own asynchronous engine, as ours do through ours; nothing else of either is used.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import statistics
import sys
import time
import zlib
from pathlib import Path
from typing import Any

Found = tuple[float, float | None, int]
"""TTFT, TPOT (seconds) and output tokens of a request."""


async def _one(
    engine: Any, name: str, request: dict[str, Any], begin_s: float, *, is_read: bool, seed: int
) -> Found:
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    dice = random.Random(seed)
    prompt = [dice.randrange(10, 100_000) for _ in range(request["prompt_len"])]
    length = request["output_len"]
    params = SamplingParams(
        temperature=0.0, max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False
    )
    params.output_kind = RequestOutputKind.DELTA if is_read else RequestOutputKind.FINAL_ONLY
    await asyncio.sleep(max(0.0, begin_s + request["arrival_s"] - time.perf_counter()))
    sent_s, first_s, last_s, count = time.perf_counter(), 0.0, 0.0, 0
    async for output in engine.generate(TokensPrompt(prompt_token_ids=prompt), params, name):
        last_s = time.perf_counter()
        first_s = first_s or last_s
        count += len(output.outputs[0].token_ids)
    return first_s - sent_s, (last_s - first_s) / (count - 1) if count > 1 else None, count


async def _all(engine: Any, load: dict[str, Any], number: int) -> dict[str, Any]:
    requests = load["requests"]
    # Prompts are made before the clock starts to count for anybody.
    begin_s = time.perf_counter() + 1.0
    found = await asyncio.gather(
        *(
            _one(
                engine,
                f"{load['name']}-{number}-{i}",
                request,
                begin_s,
                is_read=load["is_read"],
                seed=zlib.crc32(f"{load['name']}-{number}-{i}".encode()),
            )
            for i, request in enumerate(requests)
        )
    )
    duration_s = time.perf_counter() - begin_s
    tokens = sum(count for _, _, count in found)
    result = {
        "name": load["name"],
        "duration_s": duration_s,
        "out_tok_per_s": tokens / duration_s,
        "req_per_s": len(requests) / duration_s,
    }
    if load["is_read"]:
        ttft = [ttft_s for ttft_s, _, _ in found]
        tpot = [tpot_s for _, tpot_s, _ in found if tpot_s is not None]
        for key, values in (("ttft", ttft), ("tpot", tpot)):
            cuts = statistics.quantiles(values, n=100, method="inclusive")
            result |= {f"p50_{key}_ms": cuts[49] * 1e3, f"p99_{key}_ms": cuts[98] * 1e3}
    return result


def _without_numba(stand_ins: str) -> None:
    """vLLM imports numba for what none of these loads does; where it cannot be, a stand-in can."""
    try:
        import numba  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "numba"]:
            del sys.modules[name]
        sys.path.insert(0, stand_ins)
        # For the engine's own process too.
        os.environ["PYTHONPATH"] = f"{stand_ins}:{os.environ['PYTHONPATH']}"


async def _run(plan: dict[str, Any]) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    began_s = time.perf_counter()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**plan["engine"]))
    print(f"vLLM is ready after {time.perf_counter() - began_s:.1f} s", flush=True)
    request = {"prompt_len": 600, "output_len": 16, "arrival_s": 0.0}
    await _all(engine, {"name": "warm-up", "is_read": False, "requests": [request] * 64}, 0)
    rates: dict[str, float] = {}
    for load in plan["loads"]:
        if (share := load.get("share_of")) is not None:
            rate = load["share"] * rates[share]
            for request in load["requests"]:
                request["arrival_s"] /= rate
            load["requests"] = [r for r in load["requests"] if r["arrival_s"] < load["seconds"]]
        for number in range(load["rounds"]):
            result = await _all(engine, load, number)
            rates[load["name"]] = result["req_per_s"]
            if share is not None:
                result["requests_per_s"] = rate
            print("RESULT " + json.dumps(result), flush=True)
    engine.shutdown()


def main() -> None:
    """Read the plan and run it."""
    plan = json.loads(Path(sys.argv[1]).read_text())
    _without_numba(plan["stand_ins"])
    asyncio.run(_run(plan))


if __name__ == "__main__":
    main()
