"""The server over the real engine on the simulated device, on virtual time and real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from pie_async.engine import Engine

MESSAGES = [{"role": "user", "content": "Hi"}]


async def until(condition: Callable[[], bool]) -> None:
    while not condition():  # noqa: ASYNC110 - an engine's counts have no event
        await asyncio.sleep(0.001)


@pytest.fixture
async def engine():
    async with Engine(device="sim", debug=True) as running:
        yield running


async def test_streams_of_several_choices_add_up_to_the_whole_reply(start, engine) -> None:
    server = await start(engine)
    body = {"prompt": ["Hello", "Why"], "n": 2, "max_tokens": 6, "seed": 3}

    _, whole = await server.post("/v1/completions", body)
    events = await server.events("/v1/completions", body)

    choices = [server.json(event)["choices"][0] for event in events[:-1]]
    for expected in whole["choices"]:
        own = [choice for choice in choices if choice["index"] == expected["index"]]
        assert "".join(choice["text"] for choice in own) == expected["text"]
        ends = [choice["finish_reason"] for choice in own if choice["finish_reason"]]
        assert ends == [expected["finish_reason"]] == ["length"]


async def test_refusals_of_the_engine_name_the_clients_field(start, engine) -> None:
    server = await start(engine)
    longest = engine.model.max_model_len
    for path, body, param, code in (
        ("/v1/completions", {"prompt": [10**6]}, "prompt", None),
        ("/v1/completions", {"prompt": ""}, "prompt", None),
        ("/v1/completions", {"prompt": [1] * longest}, "prompt", "context_length_exceeded"),
        (
            "/v1/chat/completions",
            {"messages": MESSAGES, "max_completion_tokens": longest},
            "max_completion_tokens",
            "context_length_exceeded",
        ),
    ):
        status, reply = await server.post(path, body)
        error = reply["error"]
        assert (status, error["param"], error["code"]) == (400, param, code)


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_each_choices_time_is_counted_once_and_adds_up(start, engine, is_streamed) -> None:
    server = await start(engine, vllm_metrics=True)
    body = {"prompt": "Hello", "n": 2, "max_tokens": 6, "ignore_eos": True, "stream": is_streamed}
    async with server.http.post("/v1/completions", json=body) as reply:
        assert reply.status == 200
        await reply.read()
    async with server.http.get("/metrics") as reply:
        values = dict(line.rsplit(" ", 1) for line in (await reply.text()).splitlines())
    spent = {}
    for name in ("queue", "prefill", "decode", "inference"):
        assert float(values[f"pie:{name}_seconds_count"]) == 2
        spent[name] = float(values[f"pie:{name}_seconds_sum"])
        alias = f'vllm:request_{name}_time_seconds_sum{{model_name="{engine.model.name}"}}'
        assert float(values[alias]) == spent[name]
    assert spent["decode"] > spent["prefill"] > 0
    assert spent["inference"] == pytest.approx(spent["prefill"] + spent["decode"])


async def test_a_prompt_can_be_scored_without_generating(start, engine) -> None:
    server = await start(engine)
    body = {"prompt": [[1, 2, 3], [4, 5]], "echo": True, "logprobs": 1, "n": 1}
    _, longer = await server.post("/v1/completions", {**body, "max_tokens": 1})
    status, scored = await server.post("/v1/completions", {**body, "max_tokens": 0})
    assert status == 200
    assert scored["usage"]["completion_tokens"] == 0
    for one, other in zip(scored["choices"], longer["choices"], strict=True):
        assert one["finish_reason"] == "length"
        tokens = one["logprobs"]["tokens"]
        assert other["logprobs"]["tokens"][:-1] == tokens
        assert other["text"].startswith(one["text"])
        assert other["logprobs"]["token_logprobs"][:-1] == one["logprobs"]["token_logprobs"]
    events = await server.events("/v1/completions", {**body, "max_tokens": 0})
    streamed = [server.json(event)["choices"][0] for event in events[:-1]]
    assert (
        "".join(choice["text"] for choice in streamed if choice["index"] == 0)
        == (scored["choices"][0]["text"])
    )
    status, _ = await server.post("/v1/completions", {"prompt": "a", "max_tokens": 0})
    assert status == 400


async def test_a_client_that_sets_no_limit_gets_what_room_there_is(start) -> None:
    async with Engine(device="sim", debug=True, max_model_len=64) as engine:
        server = await start(engine)
        prompt = [1] * (engine.model.max_model_len - 3)
        status, reply = await server.post("/v1/completions", {"prompt": prompt})
        assert (status, reply["usage"]["completion_tokens"]) == (200, 3)
        body = {"prompt": prompt, "max_tokens": 16}
        status, reply = await server.post("/v1/completions", body)
        assert (status, reply["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_blocks_of_a_client_that_went_away_are_returned(start, engine, is_streamed) -> None:
    server = await start(engine)
    body = {"messages": MESSAGES, "n": 2, "stream": is_streamed, "ignore_eos": True}

    async def ask() -> None:
        async with server.http.post("/v1/chat/completions", json=body) as reply:
            await reply.read()

    async with asyncio.timeout(10):
        client = asyncio.create_task(ask())
        await until(lambda: engine.stats().resident_blocks > 0)
        client.cancel()
        await until(lambda: not engine.stats().running and not engine.stats().resident_blocks)
    assert engine.stats().sequences_cancelled == 2
    with pytest.raises(asyncio.CancelledError):
        await client


async def test_a_prompt_seen_before_is_reported_as_cached_to_its_tenant_alone(
    start, engine
) -> None:
    server = await start(engine)
    found = []
    for salt in (None, None, "a", "a"):
        body = {"prompt": list(range(40)), "max_tokens": 2, "cache_salt": salt}
        _, reply = await server.post("/v1/completions", body)
        found.append(reply["usage"]["prompt_tokens_details"]["cached_tokens"])
    assert found == [0, 32, 0, 32]


async def test_metrics_of_a_real_engine_are_scraped(start, engine) -> None:
    server = await start(engine)
    await server.post("/v1/completions", {"prompt": "Hello", "max_tokens": 4})
    async with server.http.get("/metrics") as reply:
        lines = (await reply.text()).splitlines()
    assert "pie:output_tokens_total 4.0" in lines
    assert 'pie:sequences{state="running"} 0.0' in lines


async def test_a_closed_engine_is_503_and_not_alive(start, engine) -> None:
    server = await start(engine)
    await engine.aclose()
    status, reply = await server.post("/v1/completions", {"prompt": "Hello"})
    assert (status, reply["error"]["code"]) == (503, "engine_stopped")
    async with server.http.get("/health") as health:
        assert health.status == 503
