"""What is no HTTP, is too slow or one connection too many, at the socket that `serve` opens."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import stat
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import pytest

from pie_async.api import listener, serve
from pie_async.errors import ConfigError
from tests.support.fake_engine import FakeEngine

pytestmark = pytest.mark.realtime

BODY = b'{"prompt": "p"}'
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
WHOLE = HEAD + b"Content-Length: %d\r\n\r\n%b" % (len(BODY), BODY)


class Served:
    """One server and raw connections to it."""

    def __init__(self, engine: FakeEngine, url: str) -> None:
        self.engine = engine
        self.url = url
        self.host, self.port = url.removeprefix("http://").split(":")

    async def connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_connection(self.host, int(self.port))

    async def answer(self, sent: bytes) -> tuple[int, bytes]:
        """Status and body of what comes back until the server hangs up or answers."""
        reader, writer = await self.connect()
        writer.write(sent)
        try:
            return await asyncio.wait_for(read_answer(reader), 20)
        finally:
            writer.close()

    async def check_alive(self) -> None:
        assert (await self.answer(WHOLE))[0] == 200


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head.lower())
    return int(head.split()[1]), await reader.readexactly(int(length[1]) if length else 0)


@pytest.fixture
async def run() -> AsyncIterator[Callable]:
    async with AsyncExitStack() as stack:

        async def start(engine: FakeEngine | None = None, **options) -> Served:
            engine = engine or FakeEngine()
            ready = asyncio.get_running_loop().create_future()
            serving = asyncio.create_task(
                serve(engine, port=0, on_ready=ready.set_result, allowed_hosts=["x"], **options)
            )

            async def stop() -> None:
                os.kill(os.getpid(), signal.SIGTERM)
                await asyncio.wait_for(serving, 10)

            stack.push_async_callback(stop)
            await asyncio.wait((ready, serving), return_when=asyncio.FIRST_COMPLETED)
            return Served(engine, await ready)

        yield start


NO_HTTP = {
    "a header line of 100 kB": HEAD + b"X: " + b"a" * 100_000 + b"\r\n\r\n",
    "a request line of 100 kB": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
    "100,000 headers": HEAD + b"".join(b"X%d: a\r\n" % i for i in range(100_000)) + b"\r\n",
    "length and chunks": HEAD + b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "two lengths": HEAD + b"Content-Length: 4\r\nContent-Length: 5\r\n\r\nabcd",
    "a negative length": HEAD + b"Content-Length: -1\r\n\r\n",
    "a length in words": HEAD + b"Content-Length: ten\r\n\r\n",
    "bare line feeds": b"GET /health HTTP/1.1\nHost: x\n\n",
    "a NUL in a header": HEAD + b"X: a\0b\r\n\r\n",
    "a header without a name": HEAD + b": a\r\n\r\n",
    "an unknown version": b"GET / HTTP/9.9\r\nHost: x\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(200)),
    "no HTTP at all": b"hello\r\n\r\n",
}


async def test_what_is_no_http_is_a_400_in_json_and_costs_nobody_else(run, caplog) -> None:
    served = await run()
    for what, sent in NO_HTTP.items():
        status, body = await served.answer(sent)
        assert status == 400, what
        error = json.loads(body)["error"]
        assert error.keys() == {"message", "type", "param", "code"}, what
        await served.check_alive()
    assert caplog.records == []  # anybody can send it


BROKEN_BODIES = {
    "a chunk's length is no number": b"Transfer-Encoding: chunked\r\n\r\nZZ\r\nabc\r\n0\r\n\r\n",
    "100,000 trailers": b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n"
    + b"".join(b"X%d: a\r\n" % i for i in range(100_000))
    + b"\r\n",
}


@pytest.mark.parametrize("what", BROKEN_BODIES)
async def test_a_body_that_breaks_http_is_a_400(run, what: str) -> None:
    served = await run()
    status, body = await served.answer(HEAD + BROKEN_BODIES[what])
    assert status == 400
    assert json.loads(body)["error"]["type"] == "invalid_request_error"
    await served.check_alive()


async def test_a_head_that_comes_too_slowly_is_cut_off(run, monkeypatch) -> None:
    monkeypatch.setattr(listener, "HEAD_S", 0.2)
    served = await run()
    silent, dripping, between = [await served.connect() for _ in range(3)]
    between[1].write(WHOLE)
    assert (await read_answer(between[0]))[0] == 200
    between[1].write(b"GET /hea")
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while not dripping[0].at_eof() and loop.time() - began_s < 5:
        dripping[1].write(b"G")
        try:
            await asyncio.wait_for(dripping[0].read(1), 0.05)
        except TimeoutError:
            continue
        except ConnectionError:
            break
    assert loop.time() - began_s < 2
    assert await asyncio.wait_for(silent[0].read(), 2) == b""
    assert await asyncio.wait_for(between[0].read(), 2) == b""
    for _, writer in (silent, dripping, between):
        writer.close()
    await served.check_alive()


async def test_a_long_answer_outlives_the_limit_on_heads(run, monkeypatch) -> None:
    monkeypatch.setattr(listener, "HEAD_S", 0.05)
    engine = FakeEngine(hold_at=0)
    served = await run(engine)
    asking = asyncio.create_task(served.answer(WHOLE))
    await engine.holding.wait()
    await asyncio.sleep(0.15)
    engine.gate.set()
    assert (await asking)[0] == 200


async def test_connections_beyond_the_limit_are_told_to_come_back(run) -> None:
    served = await run(max_connections=2)
    held = [await served.connect() for _ in range(2)]
    for _, writer in held:
        writer.write(WHOLE)
    for reader, _ in held:
        assert (await read_answer(reader))[0] == 200
    reader, writer = await served.connect()
    status, body = await read_answer(reader)
    assert status == 429
    assert json.loads(body)["error"]["code"] == "engine_overloaded"
    for each in (writer, *(writer for _, writer in held)):
        each.close()
    async with asyncio.timeout(5):
        while (await served.answer(WHOLE))[0] != 200:  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0.01)


async def test_many_requests_on_one_connection_are_answered_in_order(run) -> None:
    served = await run()
    reader, writer = await served.connect()
    writer.write(WHOLE * 200)
    for _ in range(200):
        assert (await read_answer(reader))[0] == 200
    writer.close()
    assert len(served.engine.submissions) == 200


async def test_a_client_that_waits_to_be_asked_for_its_body_is(run) -> None:
    served = await run()
    reader, writer = await served.connect()
    writer.write(HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(BODY))
    assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    writer.write(BODY)
    assert (await read_answer(reader))[0] == 200
    writer.close()
    status, body = await served.answer(HEAD + b"Expect: a-miracle\r\nContent-Length: 2\r\n\r\n{}")
    assert status == 417
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


async def test_a_client_that_half_closes_is_taken_as_gone(run) -> None:
    engine = FakeEngine(hold_at=0)
    served = await run(engine)
    reader, writer = await served.connect()
    writer.write(WHOLE)
    await asyncio.wait_for(engine.holding.wait(), 5)
    writer.write_eof()
    assert await asyncio.wait_for(reader.read(), 5) == b""
    writer.close()
    await asyncio.wait_for(engine.cancelled.wait(), 5)
    assert engine.open_ids == set()


async def test_a_unix_socket_is_its_users_alone_and_gone_afterwards(tmp_path: Path) -> None:
    path = tmp_path / "pie.sock"
    for _ in range(2):
        ready = asyncio.get_running_loop().create_future()
        mask = os.umask(0)
        try:
            serving = asyncio.create_task(serve(FakeEngine(), uds=path, on_ready=ready.set_result))
            assert await asyncio.wait_for(ready, 5) == f"unix:{path}"
        finally:
            os.umask(mask)
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        async with (
            aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(path))) as session,
            session.get("http://any-name/v1/models") as reply,
        ):
            assert reply.status == 200
        with pytest.raises(ConfigError, match="is in use"):
            listener._bind(path)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 10)
        assert not path.exists()
        path.touch()
        with pytest.raises(ConfigError, match="no socket"):
            await serve(FakeEngine(), uds=path)
        path.unlink()
        left = listener._bind(path)  # as by a server that was killed
        left.close()


async def test_a_path_that_cannot_be_listened_at_is_a_config_error(tmp_path: Path) -> None:
    for path in (tmp_path / "no" / "such", tmp_path / ("x" * 200)):
        with pytest.raises(ConfigError, match="cannot listen at") as refused:
            await serve(FakeEngine(), uds=path)
        assert refused.value.option == "uds"


async def test_an_open_server_answers_to_no_foreign_name_and_one_with_keys_to_any() -> None:
    for keys, status in (((), 403), (("key",), 200)):
        ready = asyncio.get_running_loop().create_future()
        serving = asyncio.create_task(
            serve(FakeEngine(), port=0, api_keys=keys, on_ready=ready.set_result)
        )
        async with aiohttp.ClientSession() as session:
            headers = {"Host": "evil.com", "Authorization": "Bearer key"}
            async with session.get(f"{await ready}/v1/models", headers=headers) as reply:
                assert reply.status == status
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.wait_for(serving, 10)
