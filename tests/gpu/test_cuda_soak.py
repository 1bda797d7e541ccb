"""Random submissions, cancellations and ends on the GPU, with the invariants checked."""

from __future__ import annotations

import asyncio
import os
import random
import time

import pytest

from pie_async import Engine, SamplingParams, StructuredOutputs
from pie_async.outputs import CompletionOutput

SOAK_S = float(os.environ.get("PIE_SOAK_S", "20"))
BLOCK_BYTES = 96 * 1024
SEED = 5
GUIDE = StructuredOutputs(regex="([A-Za-z]{2,9} ){200}")
"""No output is long enough to end."""


@pytest.mark.gpu
async def test_random_loads_leave_nothing_behind() -> None:
    """`PIE_SOAK_S=180` for the long run. The seed draws the load, not how threads interleave."""
    dice = random.Random(SEED)
    family = [dice.randrange(10, 4000) for _ in range(600)]
    end = time.monotonic() + SOAK_S
    finished = cancelled = 0

    async def one(engine: Engine) -> None:
        nonlocal finished, cancelled
        prompt = [*family[: dice.randrange(1, 300)], dice.randrange(10, 4000)]
        params = SamplingParams(
            temperature=dice.choice([0.0, 0.0, 0.8]),
            top_p=dice.choice([1.0, 0.9]),
            repetition_penalty=dice.choice([1.0, 1.0, 1.0, 1.1]),
            logprobs=dice.choice([None, None, None, 2]),
            n=dice.choice([1, 1, 2]),
            max_tokens=dice.randrange(1, 120),
            ignore_eos=True,
            structured_outputs=dice.choice([None, None, None, GUIDE]),
            seed=dice.randrange(100),
        )
        leave_after = dice.choice([None, None, dice.randrange(1, 40)])
        count = 0
        async for _ in engine.generate(prompt, params):
            count += 1
            if leave_after is not None and count >= leave_after:
                cancelled += 1
                return
        finished += 1

    async def reader(engine: Engine) -> None:
        while time.monotonic() < end:
            await one(engine)

    async with Engine(
        device="cuda",
        debug=True,
        device_kv_bytes=60 * BLOCK_BYTES,
        host_pool_bytes=400 * BLOCK_BYTES,
        dtype="float32",
        max_running_sequences=32,
    ) as engine:
        async with asyncio.TaskGroup() as group:
            for _ in range(48):
                group.create_task(reader(engine))
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.parked) == (0, 0, 0)
        assert (stats.resident_blocks, stats.pooled_blocks) == (0, 0)
    assert finished > 20 and cancelled > 5
    assert stats.demotions > 0
    print(f"{finished} finished, {cancelled} cancelled, {stats.demotions} demotions")  # noqa: T201


NEAR_TIE = 1e-3
"""Logarithm. In other batches float32 sums come out in another order, so where two tokens are
as likely as that, either may be taken."""


@pytest.mark.gpu
async def test_random_loads_give_the_tokens_of_an_engine_without_a_pool() -> None:
    tight = {"device_kv_bytes": 60 * BLOCK_BYTES, "host_pool_bytes": 400 * BLOCK_BYTES}
    checks = {"debug": True, "check_copies": True}
    await compare({"device": "cuda", **tight, **checks}, {"device": "cuda"}, SOAK_S)


async def compare(tight: dict, roomy: dict, seconds: float) -> None:
    """Random greedy requests for so long, each to two engines at a time: one that has to stream
    and park, and that some are taken from early, and one with room for all."""
    dice = random.Random(SEED)
    shared = {"dtype": "float32", "max_running_sequences": 32, "gpu_memory": "16GiB"}
    resident = {"device_kv_bytes": 2000 * BLOCK_BYTES, "host_pool_bytes": 0}
    end = time.monotonic() + seconds
    finished = left = tokens = 0

    async def reader(streaming: Engine, undisturbed: Engine) -> None:
        nonlocal finished, left, tokens
        while time.monotonic() < end:
            prompt = [dice.randrange(10, 4000) for _ in range(dice.randrange(1, 300))]
            most = dice.randrange(1, 120)
            leaves_at = dice.choice([None, None, dice.randrange(1, 40)])
            params = SamplingParams(
                temperature=0.0,
                max_tokens=most,
                ignore_eos=True,
                structured_outputs=dice.choice([None, None, None, GUIDE]),
                logprobs=2,
            )
            async with asyncio.TaskGroup() as group:
                mine = group.create_task(answer(streaming, prompt, params, leaves_at or most))
                theirs = group.create_task(answer(undisturbed, prompt, params, most))
            is_guided = params.structured_outputs is not None
            same_but_for_ties(prompt, mine.result(), theirs.result(), is_guided=is_guided)
            finished += leaves_at is None
            left += leaves_at is not None
            tokens += len(mine.result().token_ids)

    async with (
        Engine(**tight, **shared) as streaming,
        Engine(**{**roomy, **resident}, **shared) as undisturbed,
    ):
        async with asyncio.TaskGroup() as group:
            for _ in range(48):
                group.create_task(reader(streaming, undisturbed))
        stats = streaming.stats()
    assert finished > 20 and left > 5
    assert stats.h2d_bytes > 0 and stats.demotions > 0
    assert stats.copy_attempts_failed == stats.sequences_begun_anew == 0
    print(f"{finished} finished, {left} left early, {tokens} tokens compared, "  # noqa: T201
          f"{stats.demotions} demotions, {stats.h2d_bytes / 2**30:.1f} GiB copied in")  # fmt: skip


async def answer(
    engine: Engine, prompt: list[int], params: SamplingParams, enough: int
) -> CompletionOutput:
    """Left once there are `enough` tokens."""
    async for output in engine.generate(prompt, params):
        last = output.outputs[0]
        if len(last.token_ids) >= enough:
            break
    return last


def same_but_for_ties(
    prompt: list[int], mine: CompletionOutput, theirs: CompletionOutput, *, is_guided: bool
) -> None:
    """Equal tokens, up to a place, if any, where the two taken were all but equally likely."""
    assert len(mine.token_ids) <= len(theirs.token_ids)
    for at, (token, other) in enumerate(zip(mine.token_ids, theirs.token_ids, strict=False)):
        if token != other:
            likely = theirs.logprobs[at]
            if is_guided:  # neither need be among the likeliest: then each engine tells of its own
                likely = mine.logprobs[at] | likely
            assert token in likely, f"{prompt}: token {at} is {token} instead of {other}"
            assert abs(likely[other].logprob - likely[token].logprob) < NEAR_TIE
            return
