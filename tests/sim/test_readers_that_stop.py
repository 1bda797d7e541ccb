"""Requests that nobody reads give way to the others, and go on as if nothing had been."""

from __future__ import annotations

import asyncio

import pytest

from pie_async import Engine, SamplingParams
from pie_async.testing import check_returned
from tests.support.soak import BLOCK_BYTES

PATIENCE_S = 0.01
"""Of the simulated model: some 130 tokens."""
LONG_S = 1.0
LENGTH = 600


def an_engine(*, device_blocks: int, host_blocks: int, **options) -> Engine:
    return Engine(
        device="sim",
        model="tiny",
        debug=True,
        device_kv_bytes=device_blocks * BLOCK_BYTES,
        host_pool_bytes=host_blocks * BLOCK_BYTES,
        reader_patience_s=PATIENCE_S,
        **options,
    )


def a_request(number: int, max_tokens: int, n: int = 1) -> tuple[list[int], SamplingParams]:
    prompt = [10 + (number * 131 + i * 17) % 900 for i in range(40)]
    return prompt, SamplingParams(
        max_tokens=max_tokens, n=n, seed=number, ignore_eos=True, output_kind="delta"
    )


async def read(stream, got: dict[int, list[int]], *, outputs: int | None = None) -> None:
    """Add what the stream gives, at most so many outputs."""
    while outputs is None or outputs > 0:
        output = await anext(stream, None)
        if output is None:
            return
        for choice in output.outputs:
            got.setdefault(choice.index, []).extend(choice.token_ids)
        outputs = None if outputs is None else outputs - 1


async def undisturbed(number: int, max_tokens: int, n: int) -> dict[int, list[int]]:
    got: dict[int, list[int]] = {}
    async with an_engine(device_blocks=500, host_blocks=0) as engine:
        await read(await engine.submit(*a_request(number, max_tokens, n)), got)
    return got


async def tokens_computed(engine: Engine) -> int:
    return engine.stats().output_tokens


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize(("device_blocks", "host_blocks"), [(500, 0), (44, 200), (44, 0), (44, 8)])
async def test_unread_output_stops_and_goes_on_with_the_same_tokens(device_blocks, host_blocks, n):
    """With room for all, room in the pool, none (its KV is computed again), and a little."""
    expected = await undisturbed(1, LENGTH, n)
    got: dict[int, list[int]] = {}
    # one such request alone fills the small arena
    async with an_engine(
        device_blocks=device_blocks * n, host_blocks=host_blocks * n, prefix_caching=False
    ) as engine:
        stream = await engine.submit(*a_request(1, LENGTH, n))
        await read(stream, got, outputs=20)
        await asyncio.sleep(2 * PATIENCE_S)
        stats = engine.stats()
        assert (stats.paused, stats.running) == (n, 0)
        computed = stats.output_tokens
        await asyncio.sleep(LONG_S)
        assert engine.stats().output_tokens == computed < n * LENGTH
        # Others have the engine to themselves meanwhile.
        others = [await engine.submit(*a_request(number, 200)) for number in range(2, 6)]
        came: list[dict[int, list[int]]] = [{} for _ in others]
        async with asyncio.timeout(3600.0), asyncio.TaskGroup() as group:
            for other, tokens in zip(others, came, strict=True):
                group.create_task(read(other, tokens))
        assert [len(tokens[0]) for tokens in came] == [200] * 4
        assert engine.stats().paused == n
        await read(stream, got)
        assert got == expected
        stats = engine.stats()
        assert stats.pauses == n
        await engine.drain()
        check_returned(engine)


async def test_the_others_are_as_fast_as_without_the_one_that_does_not_read():
    async def others_take(*, with_unread: bool) -> float:
        async with an_engine(device_blocks=50, host_blocks=200) as engine:
            if with_unread:
                stream = await engine.submit(*a_request(1, LENGTH))
                await read(stream, {}, outputs=20)
                await asyncio.sleep(2 * PATIENCE_S)
                assert engine.stats().paused == 1
            began_s = asyncio.get_running_loop().time()
            async with asyncio.TaskGroup() as group:
                for number in range(2, 6):
                    other = await engine.submit(*a_request(number, 200))
                    group.create_task(read(other, {}))
            return asyncio.get_running_loop().time() - began_s

    alone_s = await others_take(with_unread=False)
    assert await others_take(with_unread=True) < 1.02 * alone_s


async def test_what_waits_for_a_reader_is_what_came_within_its_patience():
    async with an_engine(device_blocks=500, host_blocks=0) as engine:
        stream = await engine.submit(*a_request(1, 3000))
        await read(stream, {}, outputs=10)
        began = await tokens_computed(engine)
        await asyncio.sleep(PATIENCE_S)
        within_patience = await tokens_computed(engine) - began
        await asyncio.sleep(LONG_S)
        got: dict[int, list[int]] = {}
        await read(stream, got, outputs=1)
        assert within_patience <= len(got[0]) <= 1.6 * within_patience < 1000
        stream.cancel()


@pytest.mark.parametrize("end", ["cancel", "drain", "close"])
async def test_a_paused_request_can_be_ended_and_is_finished_by_a_drain(end):
    async with an_engine(device_blocks=90, host_blocks=0) as engine:
        stream = await engine.submit(*a_request(1, LENGTH, n=2))
        await read(stream, {}, outputs=10)
        await asyncio.sleep(2 * PATIENCE_S)
        assert engine.stats().paused == 2
        if end == "cancel":
            stream.cancel()
            await engine.drain()
        elif end == "drain":
            await engine.drain()
        if end != "close":
            check_returned(engine)
    reasons = {}
    async for output in stream:
        reasons |= {choice.index: choice.finish_reason for choice in output.outputs}
    assert set(reasons.values()) == {"length" if end == "drain" else "abort"}
