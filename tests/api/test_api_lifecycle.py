"""Clients that go away, servers that stop, and the application inside another one."""

from __future__ import annotations

import asyncio
import os
import signal
import socket

import aiohttp
import pytest
from aiohttp import web

from pie_async.api import create_app, serve
from pie_async.api.server import Server
from pie_async.api.sse import send_body
from pie_async.errors import ConfigError
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.realtime

BODY = {"messages": [{"role": "user", "content": "Hi"}]}
STREAMED = {**BODY, "stream": True}
CHAT = "/v1/chat/completions"


async def soon(condition: asyncio.Event) -> None:
    await asyncio.wait_for(condition.wait(), 5)


@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("hold_at", [0, 3])
async def test_client_that_goes_away_has_its_request_cancelled(start, is_streamed, hold_at) -> None:
    engine = FakeEngine(hold_at=hold_at)
    server = await start(engine)

    async def ask() -> None:
        async with server.http.post(CHAT, json={**BODY, "stream": is_streamed}) as reply:
            await reply.read()

    client = asyncio.create_task(ask())
    await soon(engine.holding)
    client.cancel()

    await soon(engine.cancelled)
    assert engine.open_ids == set()
    with pytest.raises(asyncio.CancelledError):
        await client


async def test_client_that_resets_the_connection_has_all_its_prompts_cancelled(start) -> None:
    engine = FakeEngine(hold_at=2)
    server = await start(engine)
    body = {"prompt": ["a", "b", "c"], "stream": True}

    async with aiohttp.ClientSession(base_url=server.root) as session:
        reply = await session.post("/v1/completions", json=body)
        await soon(engine.holding)
        reply.connection.transport.abort()
        await soon(engine.cancelled)

    assert len(engine.cancelled_ids) == 3
    assert engine.open_ids == set()


async def test_client_that_takes_nothing_is_cut_off(start) -> None:
    # far more than all socket buffers hold, against a reader that never reads
    engine = FakeEngine(reply="x" * 20_000)
    server = await start(engine, stall_timeout_s=0.05)
    host, port = server.runner.addresses[0]
    payload = b'{"messages": [{"role": "user", "content": "Hi"}], "stream": true}'
    with socket.create_connection((host, port)) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(payload), payload)
        )
        await soon(engine.cancelled)
    assert engine.open_ids == set()


class LongAnswer:
    """More than all socket buffers hold."""

    response_id = "long"

    async def body(self) -> bytes:
        return b"[" + b" " * 16_000_000 + b"]"


async def test_client_that_takes_nothing_of_a_long_body_is_cut_off_and_a_slow_one_is_not(
    start,
) -> None:
    ended = asyncio.Event()

    async def handler(request: web.Request) -> web.StreamResponse:
        try:
            return await send_body(request, LongAnswer(), stall_timeout_s=0.2)
        finally:
            ended.set()

    app = web.Application()
    app.router.add_get("/long", handler)
    server = await start(FakeEngine(), app=app)
    async with server.http.get("/long") as reply:
        num_bytes = 0
        while piece := await reply.content.read(2**20):
            num_bytes += len(piece)
            await asyncio.sleep(0.02)
    assert num_bytes == 16_000_002
    ended.clear()
    host, port = server.runner.addresses[0]
    with socket.create_connection((host, port)) as client:
        client.sendall(b"GET /long HTTP/1.1\r\nHost: x\r\n\r\n")
        await soon(ended)


async def test_application_works_mounted_in_another_one(start) -> None:
    engine = FakeEngine(reply="Hey")
    outer = web.Application(client_max_size=10)
    outer.add_subapp("/llm", create_app(engine, api_keys=["key"]))
    server = await start(engine, app=outer)
    server.http.headers["Authorization"] = "Bearer key"

    status, body = await server.post(f"/llm{CHAT}", BODY)
    assert (status, body["choices"][0]["message"]["content"]) == (200, "Hey")
    async with server.http.get("/llm/v1/nothing") as reply:
        assert reply.status == 404
        assert (await reply.json())["error"]["code"] == "unknown_url"
        assert "X-Request-Id" in reply.headers


async def test_embedders_shutdown_ends_open_streams_with_an_error_event(start) -> None:
    engine = FakeEngine(hold_at=2)
    server = await start(engine)
    async with server.http.post(CHAT, json={**BODY, "stream": True}) as reply:
        await soon(engine.holding)
        await server.runner.cleanup()
        text = await reply.text()
    assert '"code":"engine_stopped"' in text.split("\n\n")[-2]
    assert engine.open_ids == set()


class Running:
    """`serve` in a task, stopped by real signals."""

    def __init__(self, engine: FakeEngine, **options) -> None:
        self._ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(
            serve(engine, port=0, on_ready=self._ready.set_result, **options)
        )

    async def session(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(base_url=await asyncio.wait_for(self._ready, 5))

    async def returned(self) -> None:
        await asyncio.wait_for(self.task, 5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_signal_lets_open_requests_finish_and_refuses_new_ones(number) -> None:
    engine = FakeEngine(reply="Hello", hold_at=2)
    running = Running(engine)
    async with await running.session() as session:
        async with session.get("/health"):
            pass  # leaves a connection open
        async with session.post(CHAT, json={**BODY, "stream": True}) as reply:
            await soon(engine.holding)
            async with session.get("/health"):
                pass
            os.kill(os.getpid(), number)
            await asyncio.sleep(0)
            async with session.post(CHAT, json=BODY) as refused:
                assert refused.status == 503
                assert "Retry-After" in refused.headers
            engine.gate.set()
            text = await reply.text()
    assert text.endswith("data: [DONE]\n\n")
    await running.returned()
    assert engine.cancelled_ids == []


@pytest.mark.parametrize("is_streamed", [True, False])
async def test_what_outlasts_the_shutdown_timeout_ends_with_an_error(is_streamed) -> None:
    engine = FakeEngine(hold_at=2)
    running = Running(engine, shutdown_timeout_s=0.01)
    async with await running.session() as session:
        asking = asyncio.create_task(session.post(CHAT, json={**BODY, "stream": is_streamed}))
        await soon(engine.holding)
        os.kill(os.getpid(), signal.SIGTERM)
        async with await asking as reply:
            text = await reply.text()
    assert reply.status == (200 if is_streamed else 503)
    assert '"code":"engine_stopped"' in text
    await running.returned()
    assert engine.open_ids == set()


async def test_second_signal_does_not_wait(start) -> None:
    engine = FakeEngine(hold_at=2)
    running = Running(engine, shutdown_timeout_s=3600)
    async with (
        await running.session() as session,
        session.post(CHAT, json={**BODY, "stream": True}) as reply,
    ):
        await soon(engine.holding)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)
        os.kill(os.getpid(), signal.SIGTERM)
        assert "engine_stopped" in await reply.text()
    await running.returned()


async def test_signal_handlers_are_gone_when_serve_returns() -> None:
    before = signal.getsignal(signal.SIGTERM)
    running = Running(FakeEngine())
    async with await running.session():
        os.kill(os.getpid(), signal.SIGTERM)
        await running.returned()
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.parametrize("first_to_end", [0, 1])
async def test_two_servers_of_a_process_hear_the_same_signal(first_to_end) -> None:
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append("the application"))
    try:
        engines = [FakeEngine(hold_at=2), FakeEngine(hold_at=2)]
        servers = [Running(engine) for engine in engines]
        async with await servers[0].session() as one, await servers[1].session() as two:
            replies = [await http.post(CHAT, json=STREAMED) for http in (one, two)]
            for engine in engines:
                await soon(engine.holding)
            os.kill(os.getpid(), signal.SIGTERM)
            for number in (first_to_end, 1 - first_to_end):
                assert not servers[number].task.done()
                engines[number].gate.set()
                assert (await replies[number].text()).endswith("data: [DONE]\n\n")
                await servers[number].returned()
        assert heard == []
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.sleep(0)
        assert heard == ["the application"]
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_a_server_that_starts_later_ends_first_and_the_other_still_hears() -> None:
    staying, passing = Running(FakeEngine()), None
    async with await staying.session() as session:
        passing = Running(FakeEngine())
        async with await passing.session():
            passing.task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await passing.task
        async with session.get("/ready") as reply:
            assert reply.status == 200
        os.kill(os.getpid(), signal.SIGTERM)
        await staying.returned()


@pytest.mark.parametrize("path", ["/health", "/ready", "/v1/models", "/metrics", "/nothing", CHAT])
async def test_until_there_is_an_engine_everything_is_told_to_wait(path) -> None:
    async with Server(port=0) as server, aiohttp.ClientSession(server.url) as session:
        for method in ("GET", "POST"):
            async with session.request(method, path, json=BODY) as reply:
                assert (reply.status, reply.headers["Connection"]) == (503, "close")
                assert int(reply.headers["Retry-After"]) > 0
                assert "X-Request-Id" in reply.headers
                error = (await reply.json())["error"]
                assert (error["code"], error["type"]) == ("engine_starting", "server_error")


async def test_who_was_told_to_wait_is_served_once_there_is_an_engine() -> None:
    ready = asyncio.get_running_loop().create_future()
    async with Server(port=0) as server, aiohttp.ClientSession(server.url) as session:
        idle = await asyncio.open_connection("127.0.0.1", session._base_url.port)
        async with session.post(CHAT, json=BODY) as reply:
            assert reply.status == 503
        serving = asyncio.create_task(server.serve(FakeEngine(), on_ready=ready.set_result))
        assert await asyncio.wait_for(ready, 5) == server.url
        assert await asyncio.wait_for(idle[0].read(), 5) == b""  # not left with the old answer
        idle[1].close()
        async with session.get("/ready") as reply:
            assert reply.status == 200
        async with session.post(CHAT, json=BODY) as reply:
            assert reply.status == 200
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 5)
        with pytest.raises(aiohttp.ClientConnectorError):
            await session.get("/ready")


async def test_a_server_without_an_engine_guards_as_one_with_one() -> None:
    key = {"Authorization": "Bearer key"}
    asked = [
        ("/v1/models", {}, 401),
        ("/v1/models", key, 503),
        ("/v1/models", {**key, "Host": "evil.example"}, 403),
        ("/health", {}, 503),
    ]
    async with (
        Server(port=0, api_keys=["key"], allowed_hosts=["gpu-box"]) as server,
        aiohttp.ClientSession(server.url) as session,
    ):
        for path, headers, status in asked:
            async with session.get(path, headers=headers) as reply:
                assert reply.status == status


async def test_a_server_whose_engine_never_came_leaves_nothing() -> None:
    async with Server(port=0) as server:
        port = int(server.url.rsplit(":", 1)[1])
    with socket.socket() as free:
        free.bind(("127.0.0.1", port))


async def test_port_in_use_is_a_config_error_that_names_the_port() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"port {port} .* in use") as refused:
            await serve(FakeEngine(), port=port)
    assert refused.value.option == "port"


async def test_foreign_host_is_a_config_error_that_names_the_host() -> None:
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1") as refused:
        await serve(FakeEngine(), host="192.0.2.1", port=0)
    assert refused.value.option == "host"
