"""The `openai` package's own client against the server."""

from __future__ import annotations

import openai
import pytest

from pie_async.errors import EngineStopped, Overloaded
from tests.support.fake_engine import CACHED_TOKENS, FakeEngine

pytestmark = pytest.mark.realtime

MESSAGES = [{"role": "user", "content": "Hi"}]


async def test_chat_streams_with_usage(start) -> None:
    server = await start(FakeEngine(reply="Hello"))
    async with server.openai() as client:
        stream = await client.chat.completions.create(
            model="fake-model",
            messages=MESSAGES,
            stream=True,
            stream_options={"include_usage": True},
        )
        chunks = [chunk async for chunk in stream]
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == "Hello"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 5
    assert chunks[-1].usage.prompt_tokens_details.cached_tokens == CACHED_TOKENS


async def test_chat_replies_whole_with_logprobs(server) -> None:
    async with server.openai() as client:
        reply = await client.chat.completions.create(
            model="fake-model", messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, max_tokens=3
        )
    assert [choice.message.content for choice in reply.choices] == ["Hel", "Hel"]
    assert [choice.finish_reason for choice in reply.choices] == ["length", "length"]
    content = reply.choices[1].logprobs.content
    assert [entry.token for entry in content] == ["H", "e", "l"]
    assert content[0].top_logprobs[0].logprob == -0.5


async def test_completions_stream_and_reply_alike(server) -> None:
    asked = {"model": "fake-model", "prompt": [[65], [66]], "echo": True, "max_tokens": 2}
    async with server.openai() as client:
        whole = await client.completions.create(**asked)
        texts = {0: "", 1: ""}
        async for chunk in await client.completions.create(**asked, stream=True):
            texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == {choice.index: choice.text for choice in whole.choices} == {0: "AHe", 1: "BHe"}


async def test_extra_fields_pass_through_extra_body(server) -> None:
    async with server.openai() as client:
        await client.completions.create(
            model="fake-model", prompt="p", extra_body={"top_k": 5, "min_tokens": 2}
        )
    assert server.engine.submissions[0].params.top_k == 5


async def test_models_are_found(server) -> None:
    async with server.openai() as client:
        assert [model.id async for model in client.models.list()] == ["fake-model"]
        assert (await client.models.retrieve("fake-model")).owned_by == "pie_async"


async def test_closing_a_stream_cancels_its_request(start) -> None:
    engine = FakeEngine(hold_at=2)
    server = await start(engine)
    async with server.openai() as client:
        stream = await client.chat.completions.create(
            model="fake-model", messages=MESSAGES, stream=True
        )
        async for chunk in stream:
            if chunk.choices[0].delta.content == "e":
                break
        await stream.close()
        await engine.cancelled.wait()
    assert engine.open_ids == set()


@pytest.mark.parametrize(
    ("options", "asked", "kind", "code"),
    [
        ({}, {"temperature": 9}, openai.BadRequestError, None),
        ({}, {"model": "gpt-x"}, openai.NotFoundError, "model_not_found"),
        ({"api_keys": ["secret"]}, {}, openai.AuthenticationError, "invalid_api_key"),
        (
            {"engine": {"refusal": Overloaded("full")}},
            {},
            openai.RateLimitError,
            "engine_overloaded",
        ),
        (
            {"engine": {"refusal": EngineStopped("gone")}},
            {},
            openai.InternalServerError,
            "engine_stopped",
        ),
        (
            {"engine": {"fail_at": 1, "failure": ZeroDivisionError()}},
            {},
            openai.InternalServerError,
            "internal_error",
        ),
    ],
)
async def test_errors_become_the_clients_exceptions(start, options, asked, kind, code) -> None:
    server = await start(FakeEngine(**options.pop("engine", {})), **options)
    async with server.openai() as client:
        with pytest.raises(kind) as raised:
            await client.chat.completions.create(
                **{"model": "fake-model", "messages": MESSAGES, **asked}
            )
    assert raised.value.code == code
    assert raised.value.request_id == raised.value.response.headers["x-request-id"]


async def test_failure_in_a_stream_is_an_api_error_with_our_message(start) -> None:
    server = await start(FakeEngine(fail_at=2, failure=EngineStopped("the engine is gone")))
    async with server.openai() as client:
        stream = await client.chat.completions.create(
            model="fake-model", messages=MESSAGES, stream=True
        )
        with pytest.raises(openai.APIError, match="the engine is gone"):
            async for _ in stream:
                pass


async def test_our_own_bug_is_asked_for_only_once(start) -> None:
    server = await start(FakeEngine(fail_at=1, failure=ZeroDivisionError()))
    async with server.openai(max_retries=2) as client:
        with pytest.raises(openai.InternalServerError):
            await client.completions.create(model="fake-model", prompt="p")
    assert len(server.engine.submissions) == 1
