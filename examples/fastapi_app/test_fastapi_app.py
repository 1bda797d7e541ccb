"""The FastAPI application, spoken to as any ASGI server does."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from pie_async import Engine

pytest.importorskip("fastapi", reason="the FastAPI example needs fastapi (extra test)")

from fastapi_app import create_app

pytestmark = [pytest.mark.asyncio, pytest.mark.realtime]

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}


class AsgiClient:
    """A client without a server: calls the application."""

    def __init__(self, app) -> None:
        self._app = app

    async def post(self, path: str, body: object, *, leaves_after: int | None = None):
        """Status, headers and body; or what had come when it left."""
        received, status, headers = [], [], []
        request = {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        mail = asyncio.Queue()
        mail.put_nowait(request)

        async def send(message) -> None:
            if message["type"] == "http.response.start":
                status.append(message["status"])
                headers.extend(message["headers"])
            elif message.get("body"):
                received.append(message["body"])
                if len(received) == leaves_after:
                    mail.put_nowait({"type": "http.disconnect"})

        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "method": "POST",
            "path": path, "raw_path": path.encode(), "query_string": b"", "headers": [],
            "http_version": "1.1", "scheme": "http", "server": ("test", 80), "root_path": "",
        }  # fmt: skip
        await self._app(scope, mail.get, send)
        return status[0], dict(headers), b"".join(received)


@asynccontextmanager
async def running(engine: Engine) -> AsyncIterator[AsgiClient]:
    app = create_app(engine)
    async with app.router.lifespan_context(app):
        yield AsgiClient(app)


def simulated() -> Engine:
    return Engine(device="sim", model="tiny", debug=True)


async def test_it_streams_and_answers_whole():
    async with running(simulated()) as client:
        status, headers, body = await client.post("/v1/chat/completions", {**CHAT, "stream": True})
        _, _, whole = await client.post("/v1/completions", {"prompt": "a", "max_tokens": 3})
        _, _, response = await client.post("/v1/responses", {"input": "a", "max_output_tokens": 3})
    assert (status, headers[b"content-type"][:17]) == (200, b"text/event-stream")
    assert body.endswith(b"data: [DONE]\n\n")
    assert json.loads(whole)["usage"]["completion_tokens"] == 3
    assert json.loads(response)["status"] == "incomplete"


async def test_errors_have_their_status():
    async with running(simulated()) as client:
        status, _, body = await client.post("/v1/chat/completions", {"messages": []})
        assert (status, json.loads(body)["error"]["param"]) == (400, "messages")
        status, _, _ = await client.post("/v1/chat/completions", {**CHAT, "model": "other"})
        assert status == 404
    status, headers, _ = await client.post("/v1/chat/completions", CHAT)
    assert (status, headers[b"retry-after"]) == (503, b"5"), "the engine ended"


async def test_a_client_that_leaves_ends_its_request():
    engine = simulated()
    async with running(engine) as client:
        body = {**CHAT, "max_tokens": 100_000, "stream": True}
        _, _, received = await client.post("/v1/chat/completions", body, leaves_after=3)
        async with asyncio.timeout(5):
            while engine.stats().running:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
    assert b"[DONE]" not in received
