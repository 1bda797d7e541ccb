"""Whatever is wrong with a request: the right status, OpenAI's error JSON, the field's name."""

from __future__ import annotations

import asyncio
import gzip
import json

import pytest

from pie_async.api.body import BodyRoom
from pie_async.errors import EngineStopped, Overloaded
from tests.support.fake_engine import VOCAB_SIZE, FakeEngine

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"

USER = {"role": "user", "content": "Hi"}
IMAGE = {"type": "image_url", "image_url": {"url": "http://169.254.169.254/"}}

GUIDE = "structured_outputs"
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def tool(**fields) -> dict:
    return {"type": "function", "function": {"name": "f", **fields}}


TOOL = tool()


def completion(**fields) -> dict:
    return {"prompt": "p", **fields}


def chat(*messages: object, **fields) -> dict:
    return {"messages": list(messages or (USER,)), **fields}


BAD_PARAMETERS = [
    # path, body, field named
    *[(COMPLETIONS, completion(n=n), "n") for n in (0, -1, 129, 10**9, 1.0, True, "2", 10**400)],
    (COMPLETIONS, completion(n=10**9, stream=True), "n"),
    (COMPLETIONS, completion(max_tokens=0), "max_tokens"),
    (COMPLETIONS, completion(max_tokens=-1), "max_tokens"),
    (COMPLETIONS, completion(max_tokens=2**63), "max_tokens"),
    (CHAT, chat(max_tokens=0), "max_tokens"),
    (CHAT, chat(max_completion_tokens=0), "max_completion_tokens"),
    (CHAT, chat(max_completion_tokens="9"), "max_completion_tokens"),
    *[(CHAT, chat(temperature=value), "temperature") for value in (-1, 3, "hot", 10**400)],
    *[(CHAT, chat(top_p=value), "top_p") for value in (0, 1.1, -0.5)],
    (CHAT, chat(top_k=-2), "top_k"),
    (CHAT, chat(top_k=2**31), "top_k"),
    (CHAT, chat(min_p=1.5), "min_p"),
    (CHAT, chat(presence_penalty=2.01), "presence_penalty"),
    (CHAT, chat(frequency_penalty=-2.01), "frequency_penalty"),
    (CHAT, chat(repetition_penalty=0), "repetition_penalty"),
    *[
        (CHAT, chat(logit_bias=bias), "logit_bias")
        for bias in (
            {str(VOCAB_SIZE): 1},
            {"-1": 1},
            {"abc": 1},
            {"1.5": 1},
            {"007": 1},
            {"9" * 5000: 1},
            {"1": 1e9},
            {str(number): 1 for number in range(1025)},
            {f"not an id {number}": 1 for number in range(10_000)},
        )
    ],
    (CHAT, chat(logit_bias=[1, 2]), "logit_bias"),
    (CHAT, chat(stop=[str(number) for number in range(17)]), "stop"),
    (CHAT, chat(stop=["x"] * 10_000), "stop"),
    (CHAT, chat(stop=""), "stop"),
    (CHAT, chat(stop="x" * 10**6), "stop"),
    (CHAT, chat(stop=[1]), "stop[0]"),
    (CHAT, chat(stop_token_ids=[VOCAB_SIZE]), "stop_token_ids"),
    (CHAT, chat(stop_token_ids=[-1]), "stop_token_ids"),
    (CHAT, chat(stop_token_ids=[1] * 129), "stop_token_ids"),
    (COMPLETIONS, completion(stop_token_ids=[1] * 100_000), "stop_token_ids"),
    (CHAT, chat(min_tokens=-1), "min_tokens"),
    (CHAT, chat(min_tokens=5, max_tokens=4), "min_tokens"),
    (CHAT, chat(allowed_token_ids=[1]), "allowed_token_ids"),
    (CHAT, chat(bad_words=["x"]), "bad_words"),
    (CHAT, chat(logprobs=True, top_logprobs=21), "top_logprobs"),
    (CHAT, chat(logprobs=True, top_logprobs=-1), "top_logprobs"),
    (CHAT, chat(top_logprobs=2), "top_logprobs"),
    (CHAT, chat(logprobs=2), "logprobs"),
    (COMPLETIONS, completion(logprobs=21), "logprobs"),
    (COMPLETIONS, completion(logprobs=True), "logprobs"),
    (COMPLETIONS, completion(prompt_logprobs=10**6), "prompt_logprobs"),
    (CHAT, chat(seed=2**64), "seed"),
    (CHAT, chat(seed=int("9" * 400)), "seed"),
    (CHAT, chat(priority=2**31), "priority"),
    *[
        (CHAT, chat(cache_salt=salt), "cache_salt")
        for salt in ("", 7, ["a"], "x" * 257, "two\nlines")
    ],
    (COMPLETIONS, {}, "prompt"),
    *[
        (COMPLETIONS, {"prompt": prompt}, "prompt")
        for prompt in (
            None,
            "",
            [],
            [[]],
            [[1], []],
            [-1],
            [VOCAB_SIZE],
            [10**30],
            [1] * 256,
            ["p"] * 10_000,
            [[1]] * 10_000,
            [1] * (2**19 + 1),
        )
    ],
    (COMPLETIONS, {"prompt": [1, "a"]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": ["a", [1]]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": [[1], "a"]}, "prompt[1]"),
    (COMPLETIONS, {"prompt": {"a": 1}}, "prompt"),
    (COMPLETIONS, {"prompt": 7}, "prompt"),
    (COMPLETIONS, {"prompt": [1.5]}, "prompt[0]"),
    (COMPLETIONS, {"prompt": [["a"]]}, "prompt[0][0]"),
    (COMPLETIONS, completion(best_of=10**6), "best_of"),
    (COMPLETIONS, completion(suffix="end"), "suffix"),
    (COMPLETIONS, completion(max_completion_tokens=9), "max_completion_tokens"),
    (CHAT, chat(best_of=2), "best_of"),
    (COMPLETIONS, completion(stream_options={"include_usage": True}), "stream_options"),
    (CHAT, chat(stream_options={"include_usage": True}), "stream_options"),
    (CHAT, chat(stream=True, stream_options={"include_usage": 1}), "stream_options.include_usage"),
    *[
        (CHAT, chat(response_format=form), f"response_format{field}")
        for form, field in (
            ("json", ""),
            ([], ""),
            ({}, ".type"),
            ({"type": "yaml"}, ".type"),
            ({"type": "json_schema"}, ".json_schema"),
            ({"type": "json_schema", "json_schema": {"name": "a"}}, ".json_schema.schema"),
            ({"type": "json_schema", "json_schema": "a"}, ".json_schema"),
            *[
                (
                    {"type": "json_schema", "json_schema": {"name": name, "schema": {}}},
                    ".json_schema.name",
                )
                for name in ("", "x" * 65, "two words", "a\nb")
            ],
        )
    ],
    (COMPLETIONS, completion(structured_outputs={"regex": "a", "choice": ["b"]}), GUIDE),
    (COMPLETIONS, completion(structured_outputs={"regex": 3}), f"{GUIDE}.regex"),
    (COMPLETIONS, completion(structured_outputs={"regex": ""}), f"{GUIDE}.regex"),
    (COMPLETIONS, completion(structured_outputs={"choice": []}), f"{GUIDE}.choice"),
    (COMPLETIONS, completion(structured_outputs={"choice": ["a", ""]}), f"{GUIDE}.choice"),
    (COMPLETIONS, completion(structured_outputs={"choice": "ab"}), f"{GUIDE}.choice"),
    (CHAT, chat(structured_outputs={"structural_tag": "{}"}), f"{GUIDE}.structural_tag"),
    (COMPLETIONS, completion(guided_regex=""), "guided_regex"),
    (COMPLETIONS, completion(guided_regex="a", guided_choice=["b"]), "guided_choice"),
    (CHAT, chat(guided_regex="a", response_format={"type": "json_object"}), "guided_regex"),
    (CHAT, chat(guided_json="x" * 600_000), "guided_json"),
    (CHAT, chat(tools=[TOOL], response_format={"type": "json_object"}), "tools"),
    (CHAT, chat(tools={}), "tools"),
    (CHAT, chat(tools=[TOOL] * 129), "tools"),
    (CHAT, chat(tools=[TOOL] * 2), "tools"),
    (CHAT, chat(tools=[[]] * 100_000), "tools"),
    (CHAT, chat(tools=[{"type": "function"}]), "tools[0].function"),
    (CHAT, chat(tools=[{"type": "web_search"}]), "tools[0].type"),
    (CHAT, chat(tools=[tool(name="")]), "tools[0].function.name"),
    (CHAT, chat(tools=[tool(name="a b")]), "tools[0].function.name"),
    (CHAT, chat(tools=[TOOL, tool(parameters=[])]), "tools[1].function.parameters"),
    (CHAT, chat(tool_choice="required"), "tools"),
    (CHAT, chat(tool_choice="sometimes", tools=[TOOL]), "tool_choice"),
    (CHAT, chat(tool_choice=3, tools=[TOOL]), "tool_choice"),
    (
        CHAT,
        chat(tool_choice={"type": "function", "function": {"name": "g"}}, tools=[TOOL]),
        "tool_choice.function.name",
    ),
    (CHAT, chat(chat_template_kwargs={"enable_thinking": 1}), "chat_template_kwargs"),
    (CHAT, chat(functions=[{"name": "f"}]), "functions"),
    (CHAT, chat(modalities=["text", "audio"]), "modalities"),
    (CHAT, chat(chat_template="{{ 1 }}"), "chat_template"),
    (CHAT, chat(chat_template_kwargs={"tokenize": True}), "chat_template_kwargs"),
    (CHAT, {}, "messages"),
    (CHAT, {"messages": []}, "messages"),
    (CHAT, {"messages": "Hi"}, "messages"),
    (CHAT, {"messages": [USER] * 100}, "messages"),
    (CHAT, chat("Hi"), "messages[0]"),
    (CHAT, chat({"content": "Hi"}), "messages[0].role"),
    (CHAT, chat(USER, {"role": "root", "content": "Hi"}), "messages[1].role"),
    (CHAT, chat(USER, {"role": "tool", "content": "4"}), "messages[1].tool_call_id"),
    (CHAT, chat({**USER, "tool_calls": [CALL]}), "messages[0].tool_calls"),
    (CHAT, chat({"role": "user"}), "messages[0].content"),
    (CHAT, chat({"role": "user", "content": 3}), "messages[0].content"),
    (CHAT, chat({"role": "user", "content": [IMAGE]}), "messages[0].content[0].type"),
    (CHAT, chat({"role": "user", "content": [{"type": "text"}]}), "messages[0].content[0].text"),
    (
        CHAT,
        chat(USER, {"role": "assistant", "content": "", "tool_calls": [{"id": "a"}]}),
        "messages[1].tool_calls[0].function",
    ),
    *[
        (
            CHAT,
            chat({"role": "assistant", "tool_calls": [{**CALL, "function": function}]}),
            "messages[0].tool_calls[0].function.arguments",
        )
        for function in (
            {"name": "f", "arguments": "{"},
            {"name": "f", "arguments": "[1]"},
            {"name": "f", "arguments": "{" * 100_000},
        )
    ],
]

BAD_BODIES = [
    b"",
    b"  \n",
    b"null",
    b"[]",
    b'""',
    b'{"prompt": "p"',
    b'{"prompt": "p"} x',
    b'\xef\xbb\xbf{"prompt": "p"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\\ud800"}',
    b'{"prompt": "p", "temperature": NaN}',
    b'{"prompt": "p", "temperature": 1e999}',
    b'{"prompt": "p", "seed": ' + b"9" * 5000 + b"}",
    b'{"prompt": "p", "ignored": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
]

JSON_TYPE = {"Content-Type": "application/json"}


def check_error(body: dict) -> dict:
    assert body.keys() == {"error"}
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert isinstance(body["error"]["message"], str)
    assert body["error"]["message"]
    return body["error"]


async def check_still_serves(server) -> None:
    assert server.engine.open_ids == set()
    status, _ = await server.post(COMPLETIONS, completion())
    assert status == 200


@pytest.mark.realtime
async def test_bad_parameters_are_400_and_name_the_field(server) -> None:
    wrong = []
    for path, body, field in BAD_PARAMETERS:
        status, reply = await server.post(path, body)
        error = check_error(reply)
        if (status, error["type"], error["param"]) != (400, "invalid_request_error", field):
            wrong.append((str(body)[:80], status, error))
        assert len(error["message"]) < 500
    assert wrong == []
    assert server.engine.submissions == []
    await check_still_serves(server)


@pytest.mark.realtime
async def test_bodies_that_are_not_a_json_object_are_400(server) -> None:
    for body in BAD_BODIES:
        async with server.http.post(COMPLETIONS, data=body, headers=JSON_TYPE) as reply:
            assert reply.status == 400, body[:40]
            check_error(await reply.json())
    await check_still_serves(server)


@pytest.mark.realtime
async def test_harmless_oddities_are_served(server) -> None:
    for body in (
        b'{"prompt": "a\\u0000b"}',
        b'{"prompt": "p", "prompt": "q"}',
        b'{"prompt": "p", "temperature": 0, "n": 2}',
        b'{"prompt": "p", "top_k": -1}',
        b'{"prompt": "<|im_end|><|im_start|>system"}',
        b'{"prompt": "p", "request_id": "x\\r\\nSet-Cookie: y"}',
    ):
        async with server.http.post(COMPLETIONS, data=body, headers=JSON_TYPE) as reply:
            assert reply.status == 200, body


@pytest.mark.realtime
async def test_context_overflow_has_openais_code(server) -> None:
    status, body = await server.post(COMPLETIONS, {"prompt": "x" * 1000})
    assert status == 400
    assert check_error(body)["code"] == "context_length_exceeded"


@pytest.mark.realtime
async def test_unknown_model_is_404_model_not_found(server) -> None:
    replies = [
        await server.post(COMPLETIONS, completion(model="gpt-x")),
        await server.post(CHAT, chat(model="gpt-x" * 10_000)),
    ]
    async with server.http.get("/v1/models/gpt-x") as reply:
        replies.append((reply.status, await reply.json()))
    for status, body in replies:
        assert status == 404
        error = check_error(body)
        assert (error["code"], error["param"]) == ("model_not_found", "model")
        assert "fake-model" in error["message"]
        assert len(error["message"]) < 500


@pytest.mark.realtime
async def test_unknown_paths_and_methods_are_json_too(server) -> None:
    async with server.http.get("/v1/nothing") as reply:
        assert reply.status == 404
        check_error(await reply.json())
    async with server.http.delete(CHAT) as reply:
        assert reply.status == 405
        assert reply.headers["Allow"] == "POST"
        check_error(await reply.json())


@pytest.mark.realtime
@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/x-www-form-urlencoded", "application/json; charset=utf-7", None],
)
async def test_wrong_content_type_is_415(server, content_type) -> None:
    async with server.http.post(
        COMPLETIONS,
        data=b'{"prompt": "p"}',
        headers={"Content-Type": content_type} if content_type else {},
        skip_auto_headers=["Content-Type"],
    ) as reply:
        assert reply.status == 415
        assert "application/json" in check_error(await reply.json())["message"]


@pytest.mark.realtime
async def test_bodies_over_the_limit_are_413(start) -> None:
    server = await start(max_body_bytes=1000)
    long = json.dumps(completion(prompt="x" * 2000)).encode()
    bomb = gzip.compress(json.dumps(completion(prompt="x" * 2_000_000)).encode())

    async def chunks():
        yield long[:500]
        yield long[500:]

    for data, headers in ((long, {}), (chunks(), {}), (bomb, {"Content-Encoding": "gzip"})):
        async with server.http.post(COMPLETIONS, data=data, headers=JSON_TYPE | headers) as reply:
            assert reply.status == 413
            error = check_error(await reply.json())
            assert error["code"] == "body_too_large"
            assert "1000 bytes" in error["message"]
    await check_still_serves(server)


@pytest.mark.realtime
async def test_a_body_that_does_not_come_is_408(start) -> None:
    server = await start(body_timeout_s=0.05)

    async def slowly():
        for _ in range(100):
            yield b" "
            await asyncio.sleep(0.02)

    async with server.http.post(COMPLETIONS, data=slowly(), headers=JSON_TYPE) as reply:
        assert reply.status == 408
        assert check_error(await reply.json())["code"] == "body_timeout"
    await check_still_serves(server)


def test_bodies_beyond_the_room_for_all_are_refused_and_room_comes_back() -> None:
    room = BodyRoom(1000)
    with room.share() as first, room.share() as second:
        first.add(900)
        with pytest.raises(Overloaded):
            second.add(200)
        second.add(100)
    with room.share() as alone:
        alone.add(1000)


@pytest.mark.realtime
async def test_damaged_compression_is_400(server) -> None:
    headers = JSON_TYPE | {"Content-Encoding": "gzip"}
    async with server.http.post(COMPLETIONS, data=b"not gzip", headers=headers) as reply:
        assert reply.status == 400


@pytest.mark.realtime
async def test_overload_is_429_with_retry_after_rounded_up(start) -> None:
    server = await start(FakeEngine(refusal=Overloaded("too much is queued", retry_after_s=2.2)))
    async with server.http.post(CHAT, json=chat()) as reply:
        assert reply.status == 429
        assert reply.headers["Retry-After"] == "3"
        assert check_error(await reply.json())["code"] == "engine_overloaded"


@pytest.mark.realtime
async def test_overload_at_the_second_prompt_cancels_the_first(start) -> None:
    server = await start(FakeEngine(refusal=Overloaded("full"), refuse_after=1))
    status, _ = await server.post(COMPLETIONS, {"prompt": ["a", "b"]})
    assert status == 429
    assert server.engine.cancelled_ids == [server.engine.submissions[0].request_id]
    assert server.engine.open_ids == set()


@pytest.mark.realtime
async def test_stopped_engine_is_503_with_retry_after(start) -> None:
    server = await start(FakeEngine(refusal=EngineStopped("the engine is draining")))
    async with server.http.post(CHAT, json=chat()) as reply:
        assert reply.status == 503
        assert int(reply.headers["Retry-After"]) >= 1
        assert check_error(await reply.json())["code"] == "engine_stopped"


@pytest.mark.realtime
async def test_our_own_bugs_are_500_without_details_and_not_retried(start, caplog) -> None:
    server = await start(FakeEngine(fail_at=1, failure=RuntimeError("at 0xdeadbeef")))
    async with server.http.post(CHAT, json=chat()) as reply:
        assert reply.status == 500
        assert reply.headers["x-should-retry"] == "false"
        assert "0xdeadbeef" not in check_error(await reply.json())["message"]
        assert reply.headers["X-Request-Id"] in caplog.text


@pytest.mark.realtime
async def test_request_ids_are_echoed_only_when_harmless(server) -> None:
    for sent, is_kept in (("abc-1.2", True), ("x" * 200, False), ("a b", False), ("é", False)):
        async with server.http.get("/health", headers={"X-Request-Id": sent}) as reply:
            given = reply.headers["X-Request-Id"]
        assert (given == sent) == is_kept
        assert is_kept or given.startswith("req_")


KEYS = ("key-one", "clé-deux")


@pytest.mark.realtime
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/version", "/nothing"])
async def test_without_a_key_every_route_but_health_is_401(start, path) -> None:
    server = await start(api_keys=KEYS)
    for sent in (None, "Bearer ", "Bearer key-on", "key-one", "Basic key-one", "Bearer naïve"):
        headers = {} if sent is None else {"Authorization": sent}
        async with server.http.get(path, headers=headers) as reply:
            assert reply.status == 401, sent
            assert reply.headers["WWW-Authenticate"] == "Bearer"
            assert check_error(await reply.json())["code"] == "invalid_api_key"
    async with server.http.get("/health") as reply:
        assert reply.status == 200


@pytest.mark.realtime
@pytest.mark.parametrize("key", KEYS)
async def test_any_of_the_keys_opens_the_routes(start, key) -> None:
    server = await start(api_keys=KEYS)
    async with server.http.get("/v1/models", headers={"Authorization": f"Bearer {key}"}) as reply:
        assert reply.status == 200
