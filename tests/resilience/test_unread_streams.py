"""Readers that stop, with the built-in model: here, behind a socket, and while the engine dies."""

from __future__ import annotations

import asyncio
import os
import signal

import msgspec
import pytest

from pie_async import Engine, EngineConfig, SamplingParams
from pie_async.resilience.engine import ResilientEngine
from pie_async.resilience.policy import RestartPolicy

pytestmark = pytest.mark.realtime

CONFIG = EngineConfig(
    cpu_threads=1, device_kv_bytes=40 * 2**20, host_pool_bytes=2**26, reader_patience_s=0.05
)
LENGTH = 250
PROMPT = list(range(10, 60))
PARAMS = SamplingParams(
    temperature=0.9, seed=3, n=2, max_tokens=LENGTH, ignore_eos=True, output_kind="delta",
    presence_penalty=0.5, logprobs=1,
)  # fmt: skip


class Reading:
    """What came of a stream so far."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.num_logprobs = 0

    async def read(self, stream, *, outputs: int | None = None) -> Reading:
        async for output in stream:
            for choice in output.outputs:
                self.tokens.setdefault(choice.index, []).extend(choice.token_ids)
                self.num_logprobs += len(choice.logprobs)
            if outputs is not None and (outputs := outputs - 1) <= 0:
                break
        return self


async def until(condition) -> None:
    async with asyncio.timeout(30.0):
        while not condition():  # noqa: ASYNC110 - statistics have no event
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("kind", [Engine, ResilientEngine])
async def test_unread_output_stops_and_goes_on_with_the_same_tokens(kind):
    async with kind(CONFIG) as engine:
        expected = await Reading().read(await engine.submit(PROMPT, PARAMS))
        stream = await engine.submit(PROMPT, PARAMS)
        got = await Reading().read(stream, outputs=5)
        await until(lambda: engine.stats().paused == 2)
        computed = engine.stats().output_tokens
        await asyncio.sleep(0.5)
        # what was in flight still came
        assert engine.stats().output_tokens <= computed + 4 < 4 * LENGTH
        other = msgspec.structs.replace(PARAMS, max_tokens=20)
        came = await Reading().read(await engine.submit(PROMPT[::-1], other))
        assert [len(tokens) for tokens in came.tokens.values()] == [20, 20]
        await got.read(stream)
        assert got.tokens == expected.tokens
        assert got.num_logprobs == 2 * LENGTH


async def test_a_paused_request_survives_the_engines_death_paused_and_goes_on():
    policy = RestartPolicy(first_pause_s=0.01)
    async with ResilientEngine(CONFIG, policy=policy) as engine:
        expected = await Reading().read(await engine.submit(PROMPT, PARAMS))
        stream = await engine.submit(PROMPT, PARAMS)
        got = await Reading().read(stream, outputs=5)
        await until(lambda: engine.stats().paused == 2)
        os.kill(engine.engine_pid, signal.SIGKILL)
        await until(lambda: engine.restarts == 1 and engine.is_accepting)
        # The new engine's stats, which come a moment later: 8 tokens came before it was paused.
        await until(lambda: engine.stats().paused == 2 and engine.stats().output_tokens <= 8)
        await got.read(stream)
        assert got.tokens == expected.tokens
        assert engine.restarts == 1
