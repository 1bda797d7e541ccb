"""What is mounted works under its prefix, and what is wrong is told as elsewhere."""

from __future__ import annotations

import asyncio
import json

import aiohttp
import pytest
from aiohttp import web
from mounted_app import create_app

from pie_async import Engine

pytestmark = [pytest.mark.asyncio, pytest.mark.realtime]

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


async def test_the_api_is_there_under_its_prefix():
    engine = Engine(device="sim", model="tiny")
    runner = web.AppRunner(create_app(engine), handler_cancellation=True)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        root = f"http://127.0.0.1:{runner.addresses[0][1]}"
        async with aiohttp.ClientSession(root) as http:
            async with http.get("/") as reply:
                assert (await reply.json())["model"] == "tiny"
            async with http.get("/llm/v1/models/tiny") as reply:
                assert (await reply.json())["id"] == "tiny"
            async with http.post(
                "/llm/v1/chat/completions", json={**CHAT, "stream": True}
            ) as reply:
                text = await reply.text()
            async with http.post("/llm/v1/chat/completions", json={}) as reply:
                assert reply.status == 400
                assert (await reply.json())["error"]["param"] == "messages"
    finally:
        await runner.cleanup()
    assert text.endswith("data: [DONE]\n\n")
    assert json.loads(text.split("\n\n")[-3].removeprefix("data: "))["choices"]
    assert not engine.is_running, "it ended with its application"


async def test_two_engines_live_in_one_process_and_know_nothing_of_each_other():
    async def answer(engine: Engine, seed_text: str) -> tuple[int, ...]:
        return [output async for output in engine.generate(seed_text)][-1].outputs[0].token_ids

    options = {"device": "sim", "model": "tiny", "seed": 1}
    async with Engine(**options) as alone:
        expected = await answer(alone, "a")
    async with Engine(**options) as first, Engine(**options) as second:
        mine, theirs, _ = await asyncio.gather(
            answer(first, "a"), answer(second, "a"), answer(second, "b")
        )
        await first.aclose()
        assert second.is_accepting
        assert await answer(second, "c")
        assert (first.is_running, second.stats().sequences_finished) == (False, 3)
    assert mine == theirs == expected
