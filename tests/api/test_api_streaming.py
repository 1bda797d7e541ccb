"""The exact shape of streams."""

from __future__ import annotations

import asyncio
import json

import pytest

from pie_async.errors import EngineStopped
from tests.support.fake_engine import CACHED_TOKENS, FakeEngine

pytestmark = pytest.mark.realtime

HELLO = [{"role": "user", "content": "Hi"}]


def parsed(events: list[str]) -> list[dict]:
    """The JSON events; checks that `[DONE]` is the last and comments are only comments."""
    assert events[-1] == "data: [DONE]"
    data = [event for event in events[:-1] if not event.startswith(":")]
    return [json.loads(event.removeprefix("data: ")) for event in data]


async def test_chat_stream_is_role_content_finish_done(start) -> None:
    server = await start(FakeEngine(reply="Hey"))

    events = await server.events("/v1/chat/completions", {"messages": HELLO})

    chunks = parsed(events)
    choices = [chunk["choices"] for chunk in chunks]
    assert choices == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": end}]
        for delta, end in [
            ({"role": "assistant", "content": ""}, None),
            ({"content": "H"}, None),
            ({"content": "e"}, None),
            ({"content": "y"}, None),
            ({}, "stop"),
        ]
    ]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert chunks[0]["id"].startswith("chatcmpl-")
    assert all("usage" not in chunk for chunk in chunks)


async def test_usage_chunk_comes_last_and_all_others_carry_null(start) -> None:
    server = await start(FakeEngine(reply="Hey"))

    events = await server.events(
        "/v1/chat/completions", {"messages": HELLO, "stream_options": {"include_usage": True}}
    )

    *chunks, last = parsed(events)
    prompt_tokens = len("user: Hi\n")
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert last["choices"] == []
    assert last["usage"] == {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": 3,
        "total_tokens": prompt_tokens + 3,
        "prompt_tokens_details": {"cached_tokens": CACHED_TOKENS},
    }


async def test_every_choice_of_a_chat_gets_its_role_text_and_end(start) -> None:
    server = await start(FakeEngine(reply="Yo"))

    chunks = parsed(await server.events("/v1/chat/completions", {"messages": HELLO, "n": 3}))

    by_choice: dict[int, list[dict]] = {}
    for chunk in chunks:
        (choice,) = chunk["choices"]
        by_choice.setdefault(choice["index"], []).append(choice)
    assert sorted(by_choice) == [0, 1, 2]
    for choices in by_choice.values():
        assert choices[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(choice["delta"].get("content", "") for choice in choices) == "Yo"
        assert [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + ["stop"]
        assert all("role" not in choice["delta"] for choice in choices[1:])


async def test_completion_choices_are_numbered_by_prompt_then_n(start) -> None:
    server = await start(FakeEngine(reply="abc"))

    events = await server.events("/v1/completions", {"prompt": ["x", "yy"], "n": 2})

    chunks = parsed(events)
    texts = dict.fromkeys(range(4), "")
    ends: dict[int, str] = {}
    for chunk in chunks:
        assert chunk["object"] == "text_completion"
        (choice,) = chunk["choices"]
        texts[choice["index"]] += choice["text"]
        if choice["finish_reason"]:
            ends[choice["index"]] = choice["finish_reason"]
    assert texts == dict.fromkeys(range(4), "abc")
    assert ends == dict.fromkeys(range(4), "stop")


async def test_comments_keep_a_silent_stream_alive(start) -> None:
    engine = FakeEngine(reply="Hey", hold_at=1)
    server = await start(engine, keepalive_s=0.01)
    body = {"messages": HELLO, "stream": True}

    async with server.http.post("/v1/chat/completions", json=body) as reply:
        comments = 0
        while comments < 3:
            comments += await reply.content.readline() == b": keepalive\n"
        engine.gate.set()
        rest = await reply.read()

    assert rest.endswith(b"data: [DONE]\n\n")


async def test_failure_after_the_headers_is_an_error_event_and_no_done(start) -> None:
    server = await start(FakeEngine(fail_at=2, failure=EngineStopped("the device is gone")))

    events = await server.events("/v1/chat/completions", {"messages": HELLO})

    assert json.loads(events[-1].removeprefix("data: ")) == {
        "error": {
            "message": "the device is gone",
            "type": "server_error",
            "param": None,
            "code": "engine_stopped",
        }
    }
    assert "data: [DONE]" not in events
    assert server.engine.open_ids == set()


async def test_unexpected_failure_tells_the_client_nothing_of_its_inside(start, caplog) -> None:
    server = await start(FakeEngine(fail_at=1, failure=RuntimeError("pointer 0xdeadbeef")))

    events = await server.events("/v1/completions", {"prompt": "x"})

    assert "0xdeadbeef" not in "".join(events)
    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "0xdeadbeef" in caplog.text


async def test_sequence_cancelled_by_the_engine_ends_with_an_error_event(start) -> None:
    server = await start(FakeEngine(cancels_at=2))

    events = await server.events("/v1/chat/completions", {"messages": HELLO})

    assert json.loads(events[-1].removeprefix("data: "))["error"]["code"] == "engine_stopped"


async def test_when_one_prompt_fails_the_others_are_cancelled(start) -> None:
    engine = FakeEngine(reply="long reply", hold_at=5, fail_at=3, failing=0)
    server = await start(engine)

    events = await server.events("/v1/completions", {"prompt": ["one", "two"]})

    assert '"error"' in events[-1]
    assert engine.cancelled_ids == [engine.submissions[1].request_id]
    assert engine.open_ids == set()


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_a_stream_comes_in_chunks_to_those_who_know_of_chunks(start, version) -> None:
    server = await start(FakeEngine(reply="Hey"))
    body = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
    reader, writer = await asyncio.open_connection(*server.runner.addresses[0])
    writer.write(
        b"POST /v1/chat/completions HTTP/%b\r\nHost: x\r\nConnection: close\r\n"
        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%b"
        % (version.encode(), len(body), body)
    )
    head, _, events = (await reader.read()).partition(b"\r\n\r\n")
    writer.close()
    if version == "1.1":
        assert b"Transfer-Encoding: chunked" in head
        events = unchunked(events)
    chunks = parsed(events.decode().removesuffix("\n\n").split("\n\n"))
    said = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
    assert "".join(said) == "Hey"


def unchunked(body: bytes) -> bytes:
    """The content of a chunked body, which must end as one."""
    content = b""
    while size := int(body.partition(b"\r\n")[0], 16):
        _, _, rest = body.partition(b"\r\n")
        content += rest[:size]
        assert rest[size : size + 2] == b"\r\n"
        body = rest[size + 2 :]
    assert body == b"0\r\n\r\n"
    return content


async def test_stream_headers_say_what_proxies_must_know(server) -> None:
    body = {"messages": HELLO, "stream": True}
    async with server.http.post("/v1/chat/completions", json=body) as reply:
        await reply.read()
    assert reply.headers["Content-Type"] == "text/event-stream; charset=utf-8"
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Request-Id"].startswith("req_")
