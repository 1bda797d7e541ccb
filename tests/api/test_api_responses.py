"""Replies that are not streamed, and what of a request reaches the engine."""

from __future__ import annotations

import msgspec
import pytest

import pie_async
from pie_async.api.app import IN_FLIGHT
from pie_async.api.liveness import STUCK_AFTER_S
from pie_async.metrics import EngineStats
from pie_async.sampling_params import SamplingParams
from tests.support.fake_engine import CACHED_TOKENS, FakeEngine

pytestmark = pytest.mark.realtime

HELLO = [{"role": "user", "content": "Hi"}]


async def test_chat_response_has_all_required_keys(start) -> None:
    server = await start(FakeEngine(reply="Hey"))

    status, body = await server.post("/v1/chat/completions", {"messages": HELLO})

    assert status == 200
    assert body.pop("id").startswith("chatcmpl-")
    assert body.pop("created") > 1_700_000_000
    assert body == {
        "object": "chat.completion",
        "model": "fake-model",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hey", "refusal": None},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": {
            "prompt_tokens": 9,
            "completion_tokens": 3,
            "total_tokens": 12,
            "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
        },
    }


async def test_completion_of_several_prompts_orders_choices_and_adds_usage(start) -> None:
    server = await start(FakeEngine(reply="abc"))

    status, body = await server.post("/v1/completions", {"prompt": [[1, 2], [3]], "n": 2})

    assert status == 200
    assert [(choice["index"], choice["text"]) for choice in body["choices"]] == [
        (index, "abc") for index in range(4)
    ]
    assert body["usage"]["prompt_tokens"] == 3
    assert body["usage"]["completion_tokens"] == 12
    assert [submission.prompt for submission in server.engine.submissions] == [[1, 2], [3]]


async def test_completions_default_to_16_tokens_and_chat_to_the_contexts_end(start) -> None:
    server = await start(FakeEngine(reply="x" * 40))

    _, completion = await server.post("/v1/completions", {"prompt": "p"})
    _, chat = await server.post("/v1/chat/completions", {"messages": HELLO})

    assert completion["choices"][0]["text"] == "x" * 16
    assert completion["choices"][0]["finish_reason"] == "length"
    assert chat["choices"][0]["message"]["content"] == "x" * 40


async def test_every_sampling_field_reaches_the_engine(server) -> None:
    status, _ = await server.post(
        "/v1/completions",
        {
            "prompt": "p",
            "n": 2,
            "temperature": 0.5,
            "top_p": 0.9,
            "top_k": 7,
            "min_p": 0.1,
            "presence_penalty": 0.25,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.1,
            "logit_bias": {"42": -100, "7": 2.5},
            "seed": -3,
            "max_tokens": 9,
            "min_tokens": 2,
            "stop": ["a", "bc"],
            "stop_token_ids": [5],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
            "skip_special_tokens": False,
            "logprobs": 3,
            "priority": -4,
            "cache_salt": "tenant 7",
            "user": "someone",
            "metadata": {"ignored": [1]},
        },
    )

    assert status == 200
    (submission,) = server.engine.submissions
    assert submission.priority == -4
    assert submission.cache_salt == "tenant 7"
    assert submission.params == SamplingParams(
        n=2,
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        repetition_penalty=1.1,
        logit_bias={42: -100.0, 7: 2.5},
        seed=-3,
        max_tokens=9,
        min_tokens=2,
        stop=("a", "bc"),
        stop_token_ids=(5,),
        ignore_eos=True,
        include_stop_str_in_output=True,
        skip_special_tokens=False,
        logprobs=3,
        output_kind="final",
    )


async def test_nulls_and_neutral_values_of_unsupported_fields_are_accepted(server) -> None:
    status, _ = await server.post(
        "/v1/chat/completions",
        {
            "model": "fake-model",
            "messages": HELLO,
            "tools": None,
            "tool_choice": "none",
            "response_format": {"type": "text"},
            "modalities": ["text"],
            "n": None,
            "temperature": None,
            "stop": None,
            "stream": None,
            "stream_options": None,
        },
    )
    assert status == 200


async def test_text_parts_are_joined_and_developer_becomes_system(server) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    messages = [{"role": "developer", "content": "Be brief"}, {"role": "user", "content": parts}]

    status, _ = await server.post("/v1/chat/completions", {"messages": messages})

    assert status == 200
    assert server.engine.submissions[0].prompt == [
        {"role": "system", "content": "Be brief"},
        {"role": "user", "content": "one\ntwo"},
    ]


async def test_max_completion_tokens_wins_over_max_tokens(server) -> None:
    body = {"messages": HELLO, "max_tokens": 1, "max_completion_tokens": 3}
    _, reply = await server.post("/v1/chat/completions", body)
    assert reply["choices"][0]["message"]["content"] == "Hel"


@pytest.mark.parametrize("prompt", ["ab", [97, 98]])
async def test_echo_puts_the_prompt_before_the_output(start, prompt) -> None:
    server = await start(FakeEngine(reply="cd"))
    _, body = await server.post("/v1/completions", {"prompt": prompt, "echo": True, "n": 2})
    assert [choice["text"] for choice in body["choices"]] == ["abcd", "abcd"]


ECHO_LOGPROBS = {
    "text_offset": [0, 1, 2],
    "tokens": ["a", "b", "c"],
    "token_logprobs": [None, -1.0, -1.0],
    "top_logprobs": [None, {"c": -0.5, "b": -1.0}, {"d": -0.5, "c": -1.0}],
}


async def test_echo_with_logprobs_covers_prompt_and_output(start) -> None:
    # what evaluation harnesses ask for to score a given text
    server = await start(FakeEngine(reply="c"))
    body = {"prompt": [[97, 98]], "echo": True, "logprobs": 1, "max_tokens": 1, "seed": 1234}
    _, reply = await server.post("/v1/completions", body)
    assert reply["choices"][0]["logprobs"] == ECHO_LOGPROBS


async def test_echo_stream_and_logprobs_together_add_up_to_the_same(start) -> None:
    server = await start(FakeEngine(reply="cd"))
    body = {"prompt": "ab", "echo": True, "logprobs": 1}

    _, whole = await server.post("/v1/completions", body)
    events = await server.events("/v1/completions", body)

    chunks = [server.json(event)["choices"][0] for event in events[:-1]]
    assert "".join(chunk["text"] for chunk in chunks) == "abcd"
    expected = whole["choices"][0]["logprobs"]
    assert expected["text_offset"] == [0, 1, 2, 3]
    for key, values in expected.items():
        assert [value for chunk in chunks for value in chunk["logprobs"][key]] == values


async def test_chat_logprobs_hold_bytes_and_the_likeliest_tokens_in_order(start) -> None:
    server = await start(FakeEngine(reply="é"))
    body = {"messages": HELLO, "logprobs": True, "top_logprobs": 3}

    _, reply = await server.post("/v1/chat/completions", body)

    (entry,) = reply["choices"][0]["logprobs"]["content"]
    assert entry["token"] == "é"
    assert entry["logprob"] == -1.0
    assert entry["bytes"] == [0xC3, 0xA9]
    assert [top["logprob"] for top in entry["top_logprobs"]] == [-0.5, -1.0, -1.5]


async def test_chat_logprobs_without_top_have_none(start) -> None:
    server = await start(FakeEngine(reply="x"))
    _, reply = await server.post("/v1/chat/completions", {"messages": HELLO, "logprobs": True})
    (entry,) = reply["choices"][0]["logprobs"]["content"]
    assert entry["top_logprobs"] == []


async def test_models_are_listed_and_found_by_name_even_with_slashes(start) -> None:
    server = await start(served_model_name="org/model-1")
    async with server.http.get("/v1/models") as reply:
        (card,) = (await reply.json())["data"]
    assert card["id"] == "org/model-1"
    assert card["object"] == "model"
    assert card["max_model_len"] == 256
    async with server.http.get("/v1/models/org/model-1") as reply:
        assert await reply.json() == card
    status, _ = await server.post("/v1/completions", {"prompt": "p", "model": "org/model-1"})
    assert status == 200


async def test_version_is_the_packages(server) -> None:
    async with server.http.get("/version") as reply:
        assert await reply.json() == {"version": pie_async.__version__}


async def test_health_follows_the_engine_and_not_its_load(start) -> None:
    engine = FakeEngine(snapshot=EngineStats(running=64, waiting=1000))
    server = await start(engine)
    async with server.http.get("/health") as reply:
        assert reply.status == 200
    engine.is_accepting = False
    async with server.http.get("/health") as reply:
        assert reply.status == 200
    engine.is_running = False
    async with server.http.get("/health") as reply:
        assert reply.status == 503
        assert "Retry-After" in reply.headers


async def test_health_is_that_of_the_last_iteration(start) -> None:
    hanging = EngineStats(running=1, iterations=5, pending_s=STUCK_AFTER_S + 1)
    first = msgspec.structs.replace(hanging, iterations=0)  # kernels are compiled
    long = msgspec.structs.replace(hanging, pending_s=STUCK_AFTER_S - 1)
    server = await start(engine := FakeEngine())
    for snapshot, status in ((first, 200), (long, 200), (hanging, 503), (EngineStats(), 200)):
        engine.snapshot = snapshot
        async with server.http.get("/health") as reply:
            assert reply.status == status


async def test_ready_is_whether_requests_are_admitted(start) -> None:
    engine = FakeEngine()
    server = await start(engine)
    async with server.http.get("/ready") as reply:
        assert (reply.status, await reply.json()) == (200, {"status": "ready"})
    engine.is_accepting = False  # restarting, or draining
    async with server.http.get("/ready") as reply:
        assert reply.status == 503
        assert "Retry-After" in reply.headers
    engine.is_accepting = True
    server.runner.app[IN_FLIGHT].drain()
    async with server.http.get("/ready") as reply:
        assert reply.status == 503


async def test_metrics_show_the_engine_and_what_clients_waited_for(start) -> None:
    engine = FakeEngine(
        reply="abcd",
        snapshot=EngineStats(streamed_blocks=7, h2d_bytes=4096, cached_blocks=5, cache_evictions=3),
    )
    server = await start(engine)
    await server.events("/v1/completions", {"prompt": "p"})
    await server.post("/v1/completions", {"prompt": "p"})
    await server.post("/v1/completions", {"prompt": ""})

    async with server.http.head("/metrics") as reply:
        assert reply.status == 200
    async with server.http.get("/metrics") as reply:
        lines = (await reply.text()).splitlines()

    for line in (
        'pie:blocks{state="streamed"} 7.0',
        'pie:blocks{state="cached"} 5.0',
        "pie:cache_evictions_total 3.0",
        "pie:prefix_query_tokens_total 0.0",
        "pie:prefix_hit_tokens_total 0.0",
        'pie:link_bytes_total{direction="h2d"} 4096.0',
        "pie:ttft_seconds_count 1.0",
        "pie:itl_seconds_count 3.0",
        "pie:e2e_seconds_count 2.0",
        'pie:choices_finished_total{finish_reason="stop"} 2.0',
        'pie:http_responses_total{route="/v1/completions",status="200"} 2.0',
        'pie:http_responses_total{route="/v1/completions",status="400"} 1.0',
    ):
        assert line in lines
