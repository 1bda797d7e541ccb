"""`pie-async top` and `pie-async trace`, in front of a server on the simulated device."""

from __future__ import annotations

import asyncio
import io
import json
import threading
from collections.abc import Iterator

import pytest
import uvloop
from aiohttp import web
from rich.console import Console

from pie_async import Engine, EngineConfig, SamplingParams
from pie_async.__main__ import main
from pie_async.api import create_app
from pie_async.cli.screen import Screen
from pie_async.config import MIB
from pie_async.live.frame import Rates
from pie_async.live.view import EngineView

CONFIG = EngineConfig(
    model="tiny", device="sim", device_kv_bytes=1 * MIB, host_pool_bytes=64 * MIB,
    streamed_blocks=60,
)  # fmt: skip


async def load(engine: Engine) -> list[EngineView]:
    """Some requests, and looks at them."""

    async def one(number: int) -> None:
        params = SamplingParams(max_tokens=40, output_kind="final")
        async for _ in engine.generate([number] * 100, params, request_id=f"[bold]r{number}"):
            pass

    first = await engine.look()
    running = asyncio.gather(*map(one, range(8)))
    await asyncio.sleep(1.2e-3)
    middle = await engine.look(since_s=first.now_s)
    await running
    return [first, middle]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    ready, over, urls = threading.Event(), asyncio.Event(), []

    async def serve() -> None:
        async with Engine(CONFIG) as engine:
            await load(engine)
            runner = web.AppRunner(create_app(engine, api_keys=["k"]), handler_cancellation=True)
            await runner.setup()
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            urls.append(f"http://127.0.0.1:{runner.addresses[0][1]}")
            ready.set()
            await over.wait()
            await runner.cleanup()

    loop = uvloop.new_event_loop()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    assert ready.wait(30)
    yield urls[0]
    loop.call_soon_threadsafe(over.set)
    thread.join(30)
    loop.close()


def test_top_shows_a_server_once(url, capsys) -> None:
    assert main(["top", url, "--api-key", "k", "--once"]) == 0
    shown = capsys.readouterr().out
    for words in ("tiny", "live", "tokens/s", "expansion 1.00x", "arena", "pool", "governor:"):
        assert words in shown


def test_trace_saves_what_perfetto_opens(url, tmp_path, capsys) -> None:
    path = tmp_path / "trace.json"
    assert main(["trace", url, "--api-key", "k", "-o", str(path), "-n", "10"]) == 0
    trace = json.loads(path.read_text())
    assert trace["otherData"]["iterations"] == 10
    assert "10 iterations" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["top", "--once"], ["trace"]])
def test_what_cannot_be_watched_is_one_line(url, command, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for address, key, says in (
        (url, "wrong", "401"),
        ("http://127.0.0.1:9", "k", "cannot talk to"),
        ("nonsense", "k", "is not a URL"),
    ):
        name, *rest = command
        assert main([name, address, "--api-key", key, *rest]) == 1
        error = capsys.readouterr().err
        assert says in error and error.strip().count("\n") == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("count", ["0", "5000", "x"])
def test_bad_numbers_of_iterations_are_refused(count, capsys) -> None:
    assert main(["trace", "http://127.0.0.1:9", "-n", count]) == 2
    assert "iterations" in capsys.readouterr().err


def test_top_without_a_terminal_says_what_to_do(url, capsys) -> None:
    assert main(["top", url, "--api-key", "k"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("pie-async: ") and "--once" in error


@pytest.mark.parametrize("width", [60, 100, 200])
async def test_a_busy_engine_is_drawn_within_the_terminals_width(width: int) -> None:
    async with Engine(CONFIG) as engine:
        first, middle = await load(engine)
    rates, screen = Rates(model="tiny", version="1"), Screen()
    screen.take("no connection yet")
    console = Console(width=width, record=True, force_terminal=True, file=io.StringIO())
    console.print(screen)
    for view in (first, middle):
        screen.take(rates.frame(view, is_accepting=True))
    console.print(screen)
    shown = console.export_text()
    assert shown.startswith("no connection yet")
    assert max(map(len, shown.splitlines())) <= width
    for words in (" running", "in the pool", "[bold]r0", "█", "to device"):
        assert words in shown
    assert middle.stats.streamed_blocks > 0
    screen.take("the server stopped")
    console.print(screen)
    assert "the server stopped" in console.export_text()
