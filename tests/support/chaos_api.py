"""A seed's clients as OpenAI's: bodies in JSON, answers in events or one piece, down to the engine.

All of the API but HTTP itself: sockets are the operating system's, which no seed decides about
(`scripts/soak_http.py` has thousands of them). What a client sees is checked against its seed as
without the API: texts, ends, counts of tokens, and how it is told that something went wrong.
"""

from __future__ import annotations

import asyncio
import json
from contextlib import aclosing
from typing import Any

from pie_async.engine import Engine
from pie_async.errors import PieError
from pie_async.openai.answer import Answer
from pie_async.openai.errors import error_reply
from pie_async.openai.framing import DONE
from pie_async.openai.service import OpenAIService
from pie_async.testing import expected_tokens
from tests.support.chaos import Chaos, Client
from tests.support.chaos_checks import Seen, may_be_cut

REFUSALS = {400: "InvalidRequest", 429: "Overloaded", 503: "EngineStopped"}


async def visit(engine: Engine, chaos: Chaos, number: int, seen: list[Seen]) -> None:
    """One client, to its end."""
    client = chaos.clients[number]
    await asyncio.sleep(client.at_s)
    is_streamed = chaos.dice(f"api {number}").random() < 0.7
    try:
        answer = await OpenAIService(engine).completion(_body(client, is_streamed=is_streamed))
    except PieError as refusal:
        if engine.failure is not None and not chaos.is_meant(engine.failure):
            raise
        _end_all(seen, REFUSALS[error_reply(refusal).status])
        return
    read = _read_events if is_streamed else _read_body
    reading = asyncio.create_task(read(answer, client, seen), name=f"client-{number}")
    try:
        if client.manner in ("reads", "is slow"):
            await reading
            return
        await asyncio.wait([reading], timeout=client.patience_s)
        reading.cancel()
        await asyncio.wait([reading])
        if not reading.cancelled():
            reading.result()
    finally:
        await answer.aclose()


def _body(client: Client, *, is_streamed: bool) -> bytes:
    params = client.params
    body: dict[str, Any] = {
        "prompt": list(client.prompt),
        "max_tokens": params.max_tokens,
        "n": params.n,
        "seed": params.seed,
        "stop": list(params.stop) or None,
        "priority": client.priority,
        "cache_salt": client.cache_salt,
        "stream": is_streamed,
    }
    if params.structured_outputs is not None:
        guide = params.structured_outputs
        body["structured_outputs"] = {guide.kind: getattr(guide, guide.kind)}
    if is_streamed:
        body["stream_options"] = {"include_usage": True}
    return json.dumps(body).encode()


async def _read_events(answer: Answer, client: Client, seen: list[Seen]) -> None:
    usage, last = None, b""
    async with aclosing(answer.events()) as events:  # as `api/sse.py` does: an error is the last
        async for piece in events:
            for event in piece.removesuffix(b"\n\n").split(b"\n\n"):
                last = event + b"\n\n"
                if event.startswith(b":") or last == DONE:
                    continue
                told = json.loads(event.removeprefix(b"data: "))
                if "error" in told:
                    _end_all(seen, told["error"]["code"])
                    return
                for choice in told["choices"]:
                    seen[choice["index"]].text += choice["text"]
                    seen[choice["index"]].end = choice["finish_reason"]
                usage = told["usage"] or usage
            if client.manner == "is slow":
                await asyncio.sleep(client.patience_s)
    assert last == DONE, f"{client}: a stream that was read to its end ended with {last!r}"
    _check_usage(usage, client)


async def _read_body(answer: Answer, client: Client, seen: list[Seen]) -> None:
    try:
        told = json.loads(await answer.body())
    except PieError as error:
        _end_all(seen, error_reply(error).detail.code or "")
        return
    assert [choice["index"] for choice in told["choices"]] == list(range(client.params.n))
    for output, choice in zip(seen, told["choices"], strict=True):
        output.text, output.end = choice["text"], choice["finish_reason"]
    _check_usage(told["usage"], client)


def _check_usage(usage: dict[str, Any] | None, client: Client) -> None:
    assert usage is not None and usage["prompt_tokens"] == len(client.prompt), f"{client}: {usage}"
    most = client.params.n * (client.params.max_tokens or 0)
    assert client.params.n <= usage["completion_tokens"] <= most, f"{client}: {usage}"
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def _end_all(seen: list[Seen], end: str) -> None:
    for output in seen:
        output.end = output.end or end


def check_texts(engine: Engine, chaos: Chaos, client: Client, outputs: list[Seen]) -> None:
    """Whatever a client was told is what its seed says, and it ended as its manners allow."""
    is_unsafe = may_be_cut(chaos)
    for index, seen in enumerate(outputs):
        tokens = expected_tokens(engine, len(client.prompt), client.params, index=index)
        text = "".join(map(engine.tokenizer.token_text, tokens))
        assert text.startswith(seen.text), f"{client}: {seen.text!r} of {text!r}"
        if seen.end == "stop":
            assert text[len(seen.text) :].startswith(client.params.stop), f"{client}: {text!r}"
        elif seen.end == "length":
            assert is_unsafe or seen.text == text, f"{client}: {seen.text!r} of {text!r}"
        elif client.manner in ("reads", "is slow") and not is_unsafe:
            refused = chaos.options["max_queued_requests"] < len(chaos.clients)
            assert refused and seen.end == "Overloaded", f"{client} ended with {seen}"
        assert not any(stop in seen.text for stop in client.params.stop)
