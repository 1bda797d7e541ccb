"""A real server on 127.0.0.1 in front of a scripted engine."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack

import aiohttp
import openai
import pytest
from aiohttp import web

from pie_async.api.app import create_app
from tests.support.fake_engine import FakeEngine


class Server:
    """One running application, its engine, and clients for it."""

    def __init__(self, engine: FakeEngine, runner: web.AppRunner, root: str) -> None:
        self.engine = engine
        self.runner = runner
        self.root = root
        self.http = aiohttp.ClientSession(base_url=root)

    async def post(self, path: str, body: object) -> tuple[int, dict]:
        """Status and JSON of a reply that is not streamed."""
        data = io.BytesIO(json.dumps(body).encode())
        headers = {"Content-Type": "application/json"}
        async with self.http.post(path, data=data, headers=headers) as reply:
            return reply.status, await reply.json()

    async def events(self, path: str, body: dict) -> list[str]:
        """All events and comments of a streamed reply, as sent."""
        async with self.http.post(path, json={**body, "stream": True}) as reply:
            assert reply.status == 200, await reply.text()
            text = (await reply.read()).decode()
        assert text.endswith("\n\n")
        return text.removesuffix("\n\n").split("\n\n")

    @staticmethod
    def json(event: str) -> dict:
        """The JSON of one event."""
        return json.loads(event.removeprefix("data: "))

    def openai(self, **options) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            base_url=f"{self.root}/v1",
            api_key=options.pop("api_key", "none"),
            max_retries=options.pop("max_retries", 0),
            **options,
        )


@pytest.fixture
async def start() -> AsyncIterator[Callable[..., Awaitable[Server]]]:
    """Call it with an engine and `create_app`'s options to get a server; any number of times."""
    async with AsyncExitStack() as stack:

        async def run(
            engine: FakeEngine | None = None, *, app: web.Application | None = None, **options
        ) -> Server:
            engine = engine or FakeEngine()
            runner = web.AppRunner(
                app or create_app(engine, **options), handler_cancellation=True, shutdown_timeout=1
            )
            await runner.setup()
            stack.push_async_callback(runner.cleanup)
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            port = runner.addresses[0][1]
            server = Server(engine, runner, f"http://127.0.0.1:{port}")
            stack.push_async_callback(server.http.close)
            return server

        yield run


@pytest.fixture
async def server(start) -> Server:
    """A server with a default engine."""
    return await start()
