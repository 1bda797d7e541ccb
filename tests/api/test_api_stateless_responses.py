"""/v1/responses, /tokenize and /detokenize; the former with OpenAI's own client and types."""

from __future__ import annotations

import json
from dataclasses import replace

import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from pie_async.errors import EngineStopped
from tests.support.fake_engine import CACHED_TOKENS, FakeEngine, FakeModel

pytestmark = pytest.mark.realtime

PATH = "/v1/responses"
EVENT = TypeAdapter(ResponseStreamEvent)
TOOLS = [{"type": "function", "name": "weather", "parameters": {"type": "object"}, "strict": True}]
CALLING = (
    "<think>Which city?</think>Let me look.\n"
    '<tool_call>{"name": "weather", "arguments": {"city": "Oslo"}}</tool_call>'
)


def engine(reply: str = "Hello", **fields) -> FakeEngine:
    model = replace(FakeModel(max_model_len=4096), thinks="<think>" in reply)
    return FakeEngine(reply=reply, model=model, **fields)


async def stream(server, body: dict) -> list[dict]:
    """The events; checks their names, numbers and, by OpenAI's types, their fields."""
    events = []
    for number, text in enumerate(await server.events(PATH, body)):
        name, _, data = text.partition("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        assert event["sequence_number"] == number
        EVENT.validate_python(event, strict=False)
        events.append(event)
    return events


def kinds(events: list[dict]) -> list[str]:
    """Types in order, repeated ones once."""
    names = [event["type"].removeprefix("response.") for event in events]
    return [name for at, name in enumerate(names) if at == 0 or name != names[at - 1]]


MESSAGE = ["output_item.added", "content_part.added", "output_text.delta", "output_text.done"]
MESSAGE += ["content_part.done", "output_item.done"]
THOUGHT = [name.replace("output_text", "reasoning_text") for name in MESSAGE]
CALL = ["output_item.added", "function_call_arguments.delta", "function_call_arguments.done"]
CALL += ["output_item.done"]


async def test_a_text_comes_in_openais_order(start) -> None:
    server = await start(engine("Hello"))
    events = await stream(
        server, {"input": "Hi", "instructions": "Be brief.", "metadata": {"a": "b"}}
    )
    assert kinds(events) == ["created", "in_progress", *MESSAGE, "completed"]
    assert "".join(e["delta"] for e in events if e["type"].endswith("text.delta")) == "Hello"
    last = events[-1]["response"]
    assert last["output"][0]["content"][0]["text"] == "Hello"
    assert last["metadata"] == {"a": "b"}
    assert last["store"] is False
    usage = last["usage"]
    assert usage["output_tokens"] == 5
    assert usage["input_tokens_details"]["cached_tokens"] == CACHED_TOKENS
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert server.engine.submissions[0].prompt == turns


async def test_thoughts_text_and_calls_are_items(start) -> None:
    server = await start(engine(CALLING))
    body = {"input": "Weather?", "tools": TOOLS}
    events = await stream(server, body)
    assert kinds(events) == ["created", "in_progress", *THOUGHT, *MESSAGE, *CALL, "completed"]
    _, whole = await server.post(PATH, body)
    Response.model_validate(whole, strict=False)
    for response in (events[-1]["response"], whole):
        thought, said, call = response["output"]
        assert thought["content"][0]["text"] == "Which city?"
        assert said["content"][0]["text"] == "Let me look."
        assert (call["name"], json.loads(call["arguments"])) == ("weather", {"city": "Oslo"})
        assert response["tools"] == [{**TOOLS[0], "description": None}]


async def test_the_client_reads_it(start) -> None:
    server = await start(engine(CALLING))
    async with server.openai() as client:
        whole = await client.responses.create(model="fake-model", input="Weather?", tools=TOOLS)
        async with client.responses.stream(model="fake-model", input="Hi", tools=TOOLS) as events:
            names = [event.type async for event in events]
            streamed = await events.get_final_response()
    assert whole.output_text == streamed.output_text == "Let me look."
    assert names[-1] == "response.completed"
    assert streamed.output[2].parsed_arguments == {"city": "Oslo"}


async def test_the_client_parses_into_models(start) -> None:
    from pydantic import BaseModel

    class Weather(BaseModel):
        degrees: int

    server = await start(engine('{"degrees": 4}'))
    async with server.openai() as client:
        reply = await client.responses.parse(model="fake-model", input="Hi", text_format=Weather)
    assert reply.output_parsed == Weather(degrees=4)
    guide = server.engine.submissions[0].params.structured_outputs
    assert json.loads(guide.json)["required"] == ["degrees"]


async def test_one_that_was_cut_is_incomplete(start) -> None:
    server = await start(engine("Hello"))
    events = await stream(server, {"input": "Hi", "max_output_tokens": 3})
    last = events[-1]["response"]
    assert events[-1]["type"] == "response.incomplete"
    assert last["incomplete_details"] == {"reason": "max_output_tokens"}
    assert last["output"][0]["status"] == "incomplete"


async def test_an_empty_answer_is_an_empty_message(start) -> None:
    server = await start(engine(""))
    _, whole = await server.post(PATH, {"input": "Hi"})
    assert whole["output"][0]["content"] == [
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    ]


async def test_a_failure_after_the_headers_is_an_error_event(start) -> None:
    server = await start(engine("Hello", fail_at=2, failure=EngineStopped("it fell")))
    events = await stream(server, {"input": "Hi"})
    assert (events[-1]["type"], events[-1]["message"]) == ("error", "it fell")
    with pytest.raises(openai.APIStatusError, match="it fell"):
        async with server.openai() as client:
            await client.responses.create(model="fake-model", input="Hi")


CONVERSATION = [
    {"role": "developer", "content": "Be brief."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [], "content": []},
    {"role": "assistant", "content": [{"type": "output_text", "text": "Let me look."}]},
    {"type": "function_call", "call_id": "c1", "name": "weather", "arguments": '{"city": "Oslo"}'},
    {"type": "function_call_output", "call_id": "c1", "output": "rain"},
]


async def test_items_become_a_conversation(start) -> None:
    server = await start(engine())
    status, reply = await server.post(PATH, {"input": CONVERSATION, "tools": TOOLS})
    assert status == 200, reply
    system, user, assistant, tool = server.engine.submissions[0].prompt
    assert (system["role"], user["content"]) == ("system", "Weather?")
    assert assistant["content"] == "Let me look."
    assert assistant["tool_calls"][0]["function"]["arguments"] == {"city": "Oslo"}
    assert tool == {"role": "tool", "content": "rain", "tool_call_id": "c1"}


IMAGE = {"type": "input_image"}
BAD = [
    ({}, "input"),
    ({"input": []}, "input"),
    ({"input": 3}, "input"),
    ({"input": [{"content": "Hi"}]}, "input[0].role"),
    ({"input": [{"role": "user"}]}, "input[0].content"),
    ({"input": [{"type": "web_search_call"}]}, "input[0].type"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
    (
        {"input": [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "{"}]},
        "input[0].arguments",
    ),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
    ({"input": [{"type": "function_call_output", "output": "o"}]}, "input[0].call_id"),
    ({"input": "a", "previous_response_id": "resp_1"}, "previous_response_id"),
    ({"input": "a", "background": True}, "background"),
    ({"input": "a", "max_output_tokens": 0}, "max_output_tokens"),
    ({"input": "a" * 5000}, "input"),
    ({"input": "a", "temperature": 9}, "temperature"),
    ({"input": "a", "tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"input": "a", "tools": [{"type": "function", "name": ""}]}, "tools[0].name"),
    ({"input": "a", "tool_choice": "required"}, "tools"),
    ({"input": "a", "tools": TOOLS, "tool_choice": {"type": "function", "name": "x"}},
     "tool_choice.name"),
    ({"input": "a", "text": {"format": {"type": "yaml"}}}, "text.format.type"),
    ({"input": "a", "text": {"format": {"type": "json_schema"}}}, "text.format.schema"),
    (
        {"input": "a", "text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}},
        "text.format.name",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("body", "field"), BAD)
async def test_what_is_wrong_is_named(start, body, field) -> None:
    server = await start(engine())
    status, reply = await server.post(PATH, body)
    assert (status, reply["error"]["param"]) == (400, field)
    assert "messages" not in reply["error"]["message"]


async def test_tokens_there_and_back(server) -> None:
    _, tokens = await server.post("/tokenize", {"prompt": "Hé"})
    assert tokens == {"count": 2, "max_model_len": 256, "tokens": [72, 233]}
    _, text = await server.post("/detokenize", {"tokens": tokens["tokens"]})
    assert text == {"prompt": "Hé"}
    _, chat = await server.post("/tokenize", {"messages": [{"role": "user", "content": "a"}]})
    assert bytes(chat["tokens"]).decode() == "user: a\n"


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": []}, "prompt"),
        ("/tokenize", {"prompt": 3}, "prompt"),
        ("/tokenize", {"messages": [{"role": "root", "content": "a"}]}, "messages[0].role"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": ["a"]}, "tokens[0]"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [1] * 600_000}, "tokens"),
        ("/detokenize", {"tokens": [1], "model": "x"}, "model"),
    ],
)
async def test_bad_requests_for_tokens(server, path, body, field) -> None:
    status, reply = await server.post(path, body)
    assert status in (400, 404)
    assert reply["error"]["param"] == field
