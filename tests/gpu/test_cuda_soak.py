"""Random submissions, cancellations and ends on the GPU, with the invariants checked."""

from __future__ import annotations

import asyncio
import os
import random
import time

import pytest

from pie_async import Engine, SamplingParams

SOAK_S = float(os.environ.get("PIE_SOAK_S", "20"))
BLOCK_BYTES = 96 * 1024
SEED = 5


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
