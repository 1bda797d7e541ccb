"""vLLM in a process of its own: answers loads given line by line, in JSON.

    python vllm_driver.py STAND_INS < loads

The first line on stdin holds the arguments of vLLM's `AsyncEngineArgs` (vllm/engine/arg_utils.py),
each further one `{"requests": [[token ids, output tokens, arrival_s], ...], "limit_s": null}`.
Answers, one line each on stdout: `{"ready_s": ...}`, then per load `{"duration_s": ...,
"requests": [{"submitted_s", "finished_s", "arrivals": [[time_s, tokens], ...]}, ...]}`, all on
this process's clock. Requests go through `AsyncLLM` (vllm/v1/engine/async_llm.py) and are sent
and timed here, so that no pipe is part of what is measured.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from typing import Any


async def _one(engine: Any, name: str, request: list[Any], began_s: float) -> dict[str, Any]:
    from vllm import SamplingParams, TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    prompt, length, arrival_s = request
    params = SamplingParams(
        temperature=0.0, max_tokens=length, min_tokens=length, ignore_eos=True, detokenize=False
    )
    params.output_kind = RequestOutputKind.DELTA
    seen: dict[str, Any] = {"submitted_s": None, "finished_s": None, "arrivals": []}
    with contextlib.suppress(asyncio.CancelledError):  # cut off: what came counts
        await asyncio.sleep(max(0.0, began_s + arrival_s - time.perf_counter()))
        seen["submitted_s"] = time.perf_counter()
        async for output in engine.generate(TokensPrompt(prompt_token_ids=prompt), params, name):
            if count := len(output.outputs[0].token_ids):
                seen["arrivals"].append([time.perf_counter(), count])
        seen["finished_s"] = time.perf_counter()
    return seen


async def _load(engine: Any, number: int, load: dict[str, Any]) -> dict[str, Any]:
    began_s = time.perf_counter()
    tasks = [
        asyncio.create_task(_one(engine, f"{number}-{i}", request, began_s))
        for i, request in enumerate(load["requests"])
    ]
    _, late = await asyncio.wait(tasks, timeout=load["limit_s"])
    duration_s = time.perf_counter() - began_s
    for task in late:
        task.cancel()
    await asyncio.gather(*late, return_exceptions=True)
    # A task that was cut off before it began has no result.
    seen = [task.result() for task in tasks if not task.cancelled()]
    sent = [request for request in seen if request["submitted_s"] is not None]
    return {"duration_s": duration_s, "requests": sent}


async def _run(answers: Any) -> None:
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    began_s = time.perf_counter()
    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(**json.loads(sys.stdin.readline())))
    print(json.dumps({"ready_s": time.perf_counter() - began_s}), file=answers, flush=True)
    number = 0
    while line := await asyncio.to_thread(sys.stdin.readline):
        result = await _load(engine, number, json.loads(line))
        print(json.dumps(result), file=answers, flush=True)
        number += 1
    engine.shutdown()


def _without_numba(stand_ins: str) -> None:
    """vLLM imports numba for what no load here does; where it cannot be, a stand-in can."""
    try:
        import numba  # noqa: F401
    except Exception:
        for name in [name for name in sys.modules if name.split(".")[0] == "numba"]:
            del sys.modules[name]
        sys.path.insert(0, stand_ins)
        # For the engine's own process too.
        os.environ["PYTHONPATH"] = f"{stand_ins}:{os.environ['PYTHONPATH']}"


def main() -> None:
    """Answer until stdin ends."""
    # What vLLM and its processes print goes to stderr; the answers have stdout to themselves.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    _without_numba(sys.argv[1])
    asyncio.run(_run(answers))


if __name__ == "__main__":
    main()
