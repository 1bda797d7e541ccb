"""Every kind of reply and chunk against OpenAI's published schemas."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.fake_engine import FakeEngine
from tests.support.openapi_schema import SchemaBook

pytestmark = pytest.mark.realtime

SPEC = Path(__file__).parents[3] / "shared/data/openai_chat_completions_models.openapi.json"

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}

CHAT_BODIES = [
    MESSAGES,
    {**MESSAGES, "n": 3, "max_tokens": 2},
    {**MESSAGES, "logprobs": True, "top_logprobs": 2},
]
COMPLETION_BODIES = [
    {"prompt": "p"},
    {"prompt": ["p", "q"], "n": 2, "logprobs": 2},
    {"prompt": "pq", "echo": True, "logprobs": 1},
]


@pytest.fixture(scope="module")
def book() -> SchemaBook:
    if not SPEC.is_file():
        pytest.skip(f"needs {SPEC.name} in ../shared/data")
    return SchemaBook(json.loads(SPEC.read_text()))


def allowed(error: str) -> bool:
    """Where OpenAI's own servers depart from the schema: null in streamed and echoed places."""
    is_null = ": None is not" in error
    return is_null and any(
        error.startswith(f"$.choices[0].{place}")
        for place in ("finish_reason", "logprobs.token_logprobs[0]", "logprobs.top_logprobs[0]")
    )


@pytest.mark.parametrize("body", CHAT_BODIES)
async def test_chat_replies_conform(server, book, body) -> None:
    _, reply = await server.post(CHAT, body)
    assert book.errors("CreateChatCompletionResponse", reply) == []


@pytest.mark.parametrize("body", CHAT_BODIES)
async def test_chat_chunks_conform(server, book, body) -> None:
    body = {**body, "stream_options": {"include_usage": True}}
    events = await server.events(CHAT, body)
    for event in events[:-1]:
        assert book.errors("CreateChatCompletionStreamResponse", server.json(event)) == []


@pytest.mark.parametrize("body", COMPLETION_BODIES)
async def test_completion_replies_and_chunks_conform(server, book, body) -> None:
    _, reply = await server.post(COMPLETIONS, body)
    events = await server.events(COMPLETIONS, body)
    for answer in (reply, *map(server.json, events[:-1])):
        errors = book.errors("CreateCompletionResponse", answer)
        assert [error for error in errors if not allowed(error)] == []


async def test_models_and_errors_conform(server, book) -> None:
    async with server.http.get("/v1/models") as reply:
        errors = book.errors("ListModelsResponse", await reply.json())
    assert errors == ["$.data[0]: max_model_len is not in the schema"]
    for path, body in ((CHAT, {}), (COMPLETIONS, {"prompt": "p", "model": "x"}), ("/x", {})):
        _, error = await server.post(path, body)
        assert book.errors("ErrorResponse", error) == []


async def test_a_stream_that_fails_ends_with_a_conforming_error(start, book) -> None:
    server = await start(FakeEngine(fail_at=1))
    events = await server.events(CHAT, MESSAGES)
    assert book.errors("ErrorResponse", server.json(events[-1])) == []


def test_the_checker_finds_what_is_missing_misspelled_and_of_the_wrong_type(book) -> None:
    errors = book.errors("Model", {"id": 3, "object": "modell", "created": True, "extra": 1})
    assert len(errors) == 5
