"""Calls of tools, thoughts and formats of the answer over HTTP, with OpenAI's own client."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from openai.lib.streaming.chat import ChatCompletionStreamState

from tests.support.fake_engine import FakeEngine, FakeModel

pytestmark = pytest.mark.realtime

CHAT = "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "Weather?"}]
PARAMETERS = {
    "type": "object",
    "properties": {"city": {"$ref": "#/$defs/city"}},
    "required": ["city"],
    "additionalProperties": False,
    "$defs": {"city": {"type": "string"}},
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}},
    {"type": "function", "function": {"name": "time", "description": "Now"}},
]
HERMES = (
    'Let me look.\n<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "time", "arguments": {}}\n</tool_call>'
)
LLAMA3 = '{"name": "weather", "parameters": {"city": "Oslo"}}; {"name": "time", "parameters": {}}'
REQUIRED = '[{"name": "weather", "arguments": {"city": "Oslo"}}, {"name": "time", "arguments": {}}]'
BOTH = [("weather", '{"city": "Oslo"}'), ("time", "{}")]


def engine(reply: str, **model) -> FakeEngine:
    return FakeEngine(reply=reply, model=replace(FakeModel(max_model_len=4096), **model))


async def ask(server, **fields) -> tuple[dict, dict]:
    """The same choice, whole and put together from a stream by OpenAI's own code."""
    fields = {"model": "fake-model", "messages": MESSAGES, "max_tokens": 1000, **fields}
    async with server.openai() as client:
        whole = await client.chat.completions.create(**fields)
        state = ChatCompletionStreamState(input_tools=fields.get("tools", []))
        async for chunk in await client.chat.completions.create(**fields, stream=True):
            state.handle_chunk(chunk)
    streamed = state.get_final_completion()
    return whole.choices[0].model_dump(), streamed.choices[0].model_dump()


def calls_of(choice: dict) -> list[tuple[str, str]]:
    calls = choice["message"]["tool_calls"] or []
    assert all(call["id"].startswith("call_") and call["type"] == "function" for call in calls)
    assert len({call["id"] for call in calls}) == len(calls)
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


CASES = [
    # how the model writes calls, what it wrote, what was asked, the calls, the content, the end
    ("hermes", HERMES, {}, BOTH, "Let me look.", "tool_calls"),
    ("hermes", HERMES, {"parallel_tool_calls": False}, BOTH[:1], "Let me look.", "tool_calls"),
    ("hermes", "No need.", {}, [], "No need.", "stop"),
    ("hermes", HERMES, {"tool_choice": "none"}, [], HERMES, "stop"),
    ("llama3", LLAMA3, {}, BOTH, None, "tool_calls"),
    ("llama3", '{"city": 1}', {}, [], '{"city": 1}', "stop"),
    ("hermes", REQUIRED, {"tool_choice": "required"}, BOTH, None, "tool_calls"),
    (
        "llama3",
        '{"city": "Rome"}',
        {"tool_choice": {"type": "function", "function": {"name": "weather"}}},
        [("weather", '{"city": "Rome"}')],
        None,
        "tool_calls",
    ),
]


@pytest.mark.parametrize(("spelled", "reply", "asked", "calls", "content", "end"), CASES)
async def test_calls_are_found(start, spelled, reply, asked, calls, content, end) -> None:
    server = await start(engine(reply, writes_tools_as=spelled))
    for choice in await ask(server, tools=TOOLS, **asked):
        assert calls_of(choice) == calls
        assert (choice["message"]["content"] or None) == content
        assert choice["finish_reason"] == end


async def test_what_the_engine_is_asked_for(start) -> None:
    server = await start(engine(REQUIRED))
    for choice in ("auto", "required", {"type": "function", "function": {"name": "weather"}}):
        await server.post(CHAT, {"messages": MESSAGES, "tools": TOOLS, "tool_choice": choice})
    auto, required, named = server.engine.submissions
    assert auto.chat.tools == tuple(TOOLS)
    assert auto.params.structured_outputs is None
    assert json.loads(named.params.structured_outputs.json) == PARAMETERS
    schema = json.loads(required.params.structured_outputs.json)
    assert schema["minItems"] == 1
    assert schema["$defs"]["tool0"]["properties"]["city"] == {"$ref": "#/$defs/tool0/$defs/city"}


async def test_a_conversation_with_calls_and_their_outcomes_reaches_the_template(start) -> None:
    server = await start(engine("It rains."))
    call = {"id": "c1", "type": "function"}
    call["function"] = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    turns = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
    ]
    status, _ = await server.post(CHAT, {"messages": turns, "tools": TOOLS})
    assert status == 200
    sent = server.engine.submissions[0].prompt
    assert sent[1]["tool_calls"][0]["function"] == {
        "name": "weather",
        "arguments": {"city": "Oslo"},
    }
    assert sent[1]["content"] == ""
    assert sent[2] == {"role": "tool", "content": "rain", "tool_call_id": "c1"}


THOUGHT = "<think>\nIt is a city.\n</think>\n\nOslo."


async def test_thoughts_are_apart_from_content(start) -> None:
    server = await start(engine(THOUGHT, thinks=True))
    for choice in await ask(server):
        assert choice["message"]["content"] == "Oslo."
        assert choice["message"]["reasoning_content"] == "It is a city."
    server = await start(engine(THOUGHT))
    for choice in await ask(server):
        assert choice["message"]["content"] == THOUGHT, "not of a model that does not think"


async def test_thoughts_that_the_prompt_began(start) -> None:
    server = await start(engine("Hm.</think>Oslo.", thinks=True))
    turns = [{"role": "assistant", "content": "<think>"}]
    _, reply = await server.post(CHAT, {"messages": turns})
    assert reply["choices"][0]["message"]["reasoning_content"] == "Hm."


@pytest.mark.parametrize(
    ("fields", "variables"),
    [
        ({"chat_template_kwargs": {"enable_thinking": False}}, {"enable_thinking": False}),
        ({"reasoning_effort": "none"}, {"enable_thinking": False}),
        ({"response_format": {"type": "json_object"}}, {"enable_thinking": False}),
    ],
)
async def test_a_model_is_told_not_to_think(start, fields, variables) -> None:
    server = await start(engine('{"a": 1}', thinks=True))
    _, reply = await server.post(CHAT, {"messages": MESSAGES, **fields})
    assert reply["choices"][0]["message"]["content"] == '{"a": 1}'
    assert server.engine.submissions[0].chat.variables == variables


async def test_logprobs_stay_with_a_stream_whose_text_is_held_back(start) -> None:
    server = await start(engine(HERMES))
    fields = {"messages": MESSAGES, "tools": TOOLS, "logprobs": True, "max_tokens": 1000}
    events = await server.events(CHAT, fields)
    choices = [server.json(event)["choices"][0] for event in events[:-1]]
    texts = [e["token"] for c in choices if c["logprobs"] for e in c["logprobs"]["content"]]
    assert "".join(texts) == HERMES


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
GUIDES = [
    ({"response_format": {"type": "json_object"}}, "json_object", True),
    ({"response_format": {"type": "text"}}, None, None),
    (
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": SCHEMA},
            }
        },
        "json",
        SCHEMA,
    ),
    ({"structured_outputs": {"json": SCHEMA}}, "json", SCHEMA),
    ({"structured_outputs": {"choice": ["a", "b"]}}, "choice", ("a", "b")),
    ({"guided_json": SCHEMA}, "json", SCHEMA),
    ({"guided_json": json.dumps(SCHEMA)}, "json", SCHEMA),
    ({"guided_regex": "a+"}, "regex", "a+"),
    ({"guided_choice": ["a"]}, "choice", ("a",)),
    ({"guided_grammar": 'root ::= "a"'}, "grammar", 'root ::= "a"'),
]


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
@pytest.mark.parametrize(("fields", "kind", "value"), GUIDES)
async def test_every_spelling_of_a_format(start, path, fields, kind, value) -> None:
    server = await start(engine("{}"))
    prompt = {"messages": MESSAGES} if path == CHAT else {"prompt": "p"}
    status, reply = await server.post(path, {**prompt, **fields})
    assert status == 200, reply
    guide = server.engine.submissions[0].params.structured_outputs
    if kind is None:
        assert guide is None
        return
    assert guide.kind == kind
    given = getattr(guide, kind)
    assert (json.loads(given) if kind == "json" else given) == value


async def test_the_client_parses_into_models(start) -> None:
    """`client.chat.completions.parse` with a pydantic model, as applications use it."""
    from pydantic import BaseModel

    class Weather(BaseModel):
        city: str
        degrees: int

    server = await start(engine('{"city": "Oslo", "degrees": 4}'))
    async with server.openai() as client:
        reply = await client.chat.completions.parse(
            model="fake-model", messages=MESSAGES, response_format=Weather
        )
    assert reply.choices[0].message.parsed == Weather(city="Oslo", degrees=4)
    sent = json.loads(server.engine.submissions[0].params.structured_outputs.json)
    assert sent["required"] == ["city", "degrees"]
