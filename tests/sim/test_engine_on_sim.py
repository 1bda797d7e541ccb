"""The whole engine on the checked simulated device: nothing it does may race or misplace KV."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

import pytest

from pie_async import Engine, EngineConfig, PieError, SamplingParams
from pie_async.config import KIB, MIB
from pie_async.device.sim import SimStream
from pie_async.metrics import EngineStats
from pie_async.runtime.virtual_time import VirtualTimeLoop

SMALL = {"device_kv_bytes": 1 * MIB, "host_pool_bytes": 64 * MIB}  # about 30 sequences want 4


def config(**options) -> EngineConfig:
    return EngineConfig(model="tiny", device="sim", debug=True, **options)


async def outputs(seed: int = 0, **options) -> tuple[list[tuple[int, ...]], EngineStats, float]:
    """Thirty sequences of mixed length that arrive one after the other."""
    rng = random.Random(seed)

    async def tokens(index: int, prompt: list[int], max_tokens: int) -> tuple[int, ...]:
        await asyncio.sleep(index * 5e-4)
        params = SamplingParams(max_tokens=max_tokens, temperature=0.0, output_kind="final")
        async for output in engine.generate(prompt, params):
            last = output
        return last.outputs[0].token_ids

    async with Engine(config(seed=seed, **options)) as engine:
        lengths = [(rng.randrange(20, 170), rng.randrange(10, 110)) for _ in range(30)]
        prompts = [[rng.randrange(1000) for _ in range(length)] for length, _ in lengths]
        jobs = (
            tokens(i, prompt, max_tokens)
            for i, (prompt, (_, max_tokens)) in enumerate(zip(prompts, lengths, strict=True))
        )
        found = await asyncio.gather(*jobs)
        return found, engine.stats(), asyncio.get_running_loop().time()


@pytest.mark.parametrize(
    ("options", "uses"),
    [
        ({"streamed_blocks": 60}, "demotions"),
        ({}, "demotions"),
        ({"streamed_blocks": 60, "exchange": True, "pool_idle_s": 0.001}, "promotions"),
        ({"host_pool_bytes": 0}, "preemptions_recomputed"),
        ({"layer_group": 3, "ring_depth": 2, "streamed_blocks": 20}, "demotions"),
        ({"iterations_in_flight": 1, "sim_link": "nvlink", "streamed_blocks": 60}, "promotions"),
    ],
)
async def test_tokens_are_those_of_a_run_in_which_everything_fits(options: dict, uses: str):
    roomy, stats, _ = await outputs(device_kv_bytes=256 * MIB, host_pool_bytes=0)
    assert stats.demotions == stats.preemptions_recomputed == 0
    pooled, stats, _ = await outputs(**{**SMALL, **options})
    assert getattr(stats, uses) > 0
    assert pooled == roomy


def test_the_same_run_twice_is_the_same_run():
    def once() -> tuple:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            return runner.run(outputs(seed=3, streamed_blocks=60, **SMALL))

    assert once() == once()


@pytest.mark.parametrize("seed", range(6))
async def test_random_load_with_cancellations_leaves_no_block_behind(seed: int):
    rng = random.Random(seed)
    options = {
        "device_kv_bytes": rng.choice([512, 1024]) * KIB,
        "host_pool_bytes": rng.choice([256 * KIB, 1 * MIB, 64 * MIB]),
        "streamed_blocks": rng.choice([None, 5, 40]),
        "layer_group": rng.choice([1, 2, 3]),
        "ring_depth": rng.choice([2, 3]),
        "exchange": rng.choice([False, True]),
        "block_tokens": rng.choice([4, 16]),
        "token_budget": rng.choice([32, 512]),
    }
    shared = [[rng.randrange(1000) for _ in range(48)] for _ in range(2)]

    async def one(engine: Engine, index: int, lottery: random.Random) -> None:
        await asyncio.sleep(lottery.random() * 0.02)
        prompt = lottery.choice(shared) + [lottery.randrange(1000) for _ in range(20)]
        params = SamplingParams(max_tokens=lottery.randrange(1, 80), n=lottery.choice([1, 2]))
        patience = lottery.choice([1000, lottery.randrange(1, 40)])
        async with aclosing(engine.generate(prompt, params)) as stream:
            async for _ in stream:
                patience -= 1
                if patience == 0:
                    return

    async with Engine(config(seed=seed, **options)) as engine:
        await asyncio.gather(*(one(engine, i, random.Random(seed * 99 + i)) for i in range(24)))
        await engine.drain()
        stats = engine.stats()
        assert stats.running == stats.waiting == stats.parked == 0
        assert stats.resident_blocks == stats.streamed_blocks == 0


@pytest.mark.parametrize(("name", "nth"), [("compute", 3), ("compute", 40), ("h2d", 2)])
async def test_an_engine_that_skips_a_wait_stops_instead_of_going_on(
    name: str, nth: int, monkeypatch: pytest.MonkeyPatch
):
    real_wait, waits = SimStream.wait, 0

    def forgetful(stream: SimStream, event) -> None:
        nonlocal waits
        waits += stream.name == name
        if stream.name != name or waits != nth:
            real_wait(stream, event)

    monkeypatch.setattr(SimStream, "wait", forgetful)
    with pytest.raises(PieError):
        await outputs(streamed_blocks=60, ring_depth=2, **SMALL)
    assert waits >= nth
