"""The host pool's memory goes when it is idle and comes back when it is needed."""

from __future__ import annotations

import asyncio

import pytest

from pie_async import Engine, EngineConfig, SamplingParams
from pie_async.assembly import on_sim
from pie_async.config import MIB

CHUNK_SLOTS = 20


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(on_sim, "chunk_slots_of", lambda layout, slots: min(slots, CHUNK_SLOTS))


async def burst(engine: Engine) -> list[tuple[int, ...]]:
    """More sequences than the device holds."""

    async def one(index: int) -> tuple[int, ...]:
        params = SamplingParams(max_tokens=60, temperature=0.0, output_kind="final")
        prompt = [index * 7 + i for i in range(90)]
        async for output in engine.generate(prompt, params):
            last = output
        return last.outputs[0].token_ids

    return list(await asyncio.gather(*map(one, range(24))))


def config_of(pool_idle_s: float) -> EngineConfig:
    return EngineConfig(
        model="tiny", device="sim", debug=True, device_kv_bytes=MIB, host_pool_bytes=16 * MIB,
        streamed_blocks=40, pool_idle_s=pool_idle_s,
    )  # fmt: skip


async def bursts(pool_idle_s: float) -> tuple[list[list[tuple[int, ...]]], list[int], int]:
    """What two bursts said, how large the pool was behind each and after a rest, its most."""
    async with Engine(config_of(pool_idle_s)) as engine:
        said, sizes = [], []
        most = engine.stats().host_blocks
        for _ in range(2):
            said.append(await burst(engine))
            sizes.append(engine.stats().host_blocks)
            await asyncio.sleep(10)
            sizes.append(engine.stats().host_blocks)
        assert engine.stats().demotions > CHUNK_SLOTS
        return said, sizes, most


async def test_an_idle_pool_gives_its_memory_back_and_takes_it_again():
    said, sizes, most = await bursts(pool_idle_s=1.0)
    after_first, rested, after_second, rested_again = sizes
    assert most > 2 * CHUNK_SLOTS
    assert (rested, rested_again) == (CHUNK_SLOTS, CHUNK_SLOTS)
    assert after_first == most and after_second > CHUNK_SLOTS
    kept, sizes, _ = await bursts(pool_idle_s=0.0)
    assert sizes == [most] * 4
    assert said == kept


async def test_an_engine_may_end_while_its_pool_is_given_back():
    """Chunks go one by one: some are still to go when swap-out has ended."""
    for moment in range(40):
        async with Engine(config_of(pool_idle_s=0.5)) as engine:
            await asyncio.sleep(0.5 + moment * 1e-6)
        assert engine.failure is None


async def test_while_something_runs_the_pool_keeps_its_memory():
    async with Engine(config_of(pool_idle_s=0.0005)) as engine:
        most, sizes = engine.stats().host_blocks, []
        running = asyncio.create_task(burst(engine))
        while not running.done():
            sizes.append(engine.stats().host_blocks)
            await asyncio.sleep(0.0005)
        assert len(sizes) > 20 and set(sizes) == {most}
        await asyncio.sleep(1)
        assert engine.stats().host_blocks == CHUNK_SLOTS


async def test_a_pool_reviewed_all_the_time_changes_no_output():
    said, _, _ = await bursts(pool_idle_s=0.002)
    kept, _, _ = await bursts(pool_idle_s=0.0)
    assert said == kept
