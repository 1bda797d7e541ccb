"""The live page and its feed, as far as no browser is needed to check them."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import re
import time
from importlib import resources

import msgspec
import pytest
from aiohttp import web

from pie_async import Engine, EngineConfig, SamplingParams
from pie_async.api import create_app
from pie_async.api.hosts import AllowedHosts
from pie_async.api.watching import EVERY_S, IDLE_EVERY_S, Feed
from pie_async.errors import EngineStopped
from pie_async.live.frame import LiveFrame, Rates
from pie_async.live.timeline import Span
from pie_async.metrics import EngineStats
from tests.support.fake_engine import NOTHING_TO_SEE, FakeEngine

ASSETS = resources.files("pie_async.api") / "assets"


def asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")


def parsed(event: bytes) -> tuple[str, dict]:
    kind, data = event.decode().removesuffix("\n\n").split("\n")
    return kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))


# --- the page -------------------------------------------------------------------------------


@pytest.mark.realtime
async def test_the_page_is_whole_and_may_load_and_run_nothing_else(start) -> None:
    server = await start()
    async with server.http.get("/") as reply:
        text, headers = await reply.text(), reply.headers
        assert reply.status == 200 and reply.content_type == "text/html"
    assert asset("page.css") in text and asset("page.js") in text
    policy = dict(each.split(" ", 1) for each in headers["Content-Security-Policy"].split("; "))
    assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["connect-src"] == "'self'"
    for element, rule in (("script", "script-src"), ("style", "style-src")):
        (inside,) = re.findall(rf"<{element}>(.*?)</{element}>", text, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
        assert policy[rule] == f"'sha256-{digest}'"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"


def test_nothing_on_the_page_comes_from_elsewhere() -> None:
    for name in ("page.html", "page.css", "page.js"):
        text = asset(name)
        assert not re.findall(r"(?:https?:)?//[a-z0-9-]+\.[a-z]", text), name
        assert "@import" not in text and "url(" not in text
    sources = re.findall(r"(?:src|href)=\"([^\"]*)\"", asset("page.html"))
    assert set(sources) == {"data:,", "#chat-text"}


def test_what_the_server_sends_can_only_become_text() -> None:
    script = asset("page.js")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(",
                "Function(", "setAttribute(\"on", "javascript:", ".src =", ".href ="):  # fmt: skip
        assert way not in script, way
    assert not re.findall(r"\son[a-z]+=|\sstyle=", asset("page.html"))


def test_every_control_of_the_page_has_a_name_and_every_canvas_a_text() -> None:
    html = asset("page.html")
    for canvas in re.findall(r"<canvas[^>]*>", html):
        assert 'role="img"' in canvas and "aria-label=" in canvas
    for control in re.findall(r"<(?:input|textarea)[^>]*id=\"([^\"]+)\"", html):
        labelled = f'for="{control}"' in html or re.search(
            rf"<label>[^<]*<input id=\"{control}\"", html
        )
        assert labelled, control


def test_the_script_asks_for_no_field_that_a_frame_lacks() -> None:
    frame = Rates(model="m", version="1").frame(NOTHING_TO_SEE, is_accepting=True)
    sent = msgspec.to_builtins(frame)
    script = asset("page.js")
    for owner, fields in (
        ("frame", sent), ("view", sent["view"]), ("stats", sent["view"]["stats"]),
        ("memory", sent["view"]["memory"]), ("gauge", sent["h2d"]),
    ):  # fmt: skip
        asked = set(re.findall(rf"\b{owner}\.([a-z_0-9]+)", script))
        assert asked and asked <= fields.keys(), owner


# --- who may ---------------------------------------------------------------------------------


@pytest.mark.realtime
async def test_the_page_opens_without_a_key_and_shows_nothing_without_one(start) -> None:
    server = await start(api_keys=("secret",))
    async with server.http.get("/") as reply:
        assert reply.status == 200
        assert "fake-model" not in await reply.text()
    for path in ("/view?frames=1", "/trace"):
        async with server.http.get(path) as reply:
            assert reply.status == 401, path
        async with server.http.get(path, headers={"Authorization": "Bearer secret"}) as reply:
            assert reply.status == 200, path
            await reply.read()


@pytest.mark.realtime
@pytest.mark.parametrize("path", ["/", "/view?frames=1", "/trace"])
async def test_pages_of_other_sites_are_kept_out(start, path) -> None:
    server = await start(allowed_hosts=AllowedHosts.local())
    for headers in ({"Host": "evil.example"}, {"Origin": "http://evil.example"}):
        async with server.http.get(path, headers=headers) as reply:
            assert reply.status == 403


@pytest.mark.realtime
@pytest.mark.parametrize("query", ["view?frames=0", "view?frames=x", "trace?iterations=-1",
                                   "trace?iterations=99999", "trace?iterations=²"])  # fmt: skip
async def test_bad_counts_are_400_and_name_the_parameter(server, query) -> None:
    async with server.http.get(f"/{query}") as reply:
        error = (await reply.json())["error"]
    assert reply.status == 400 and error["param"] == query.split("?")[1].split("=")[0]


# --- the feed --------------------------------------------------------------------------------


@pytest.mark.realtime
async def test_events_are_frames_and_end_where_they_should(start) -> None:
    server = await start()
    async with server.http.get("/view?frames=2") as reply:
        assert reply.content_type == "text/event-stream"
        first, second = (await reply.read()).decode().removesuffix("\n\n").split("\n\n")
    for event in (first, second):
        kind, frame = parsed(event.encode() + b"\n\n")
        assert kind == "frame"
        assert msgspec.convert(frame, LiveFrame).model == "fake-model"


@pytest.mark.realtime
async def test_a_trace_is_a_file_to_open(server) -> None:
    async with server.http.get("/trace?iterations=7") as reply:
        assert "attachment" in reply.headers["Content-Disposition"]
        assert (await reply.json())["displayTimeUnit"] == "ms"


async def test_an_idle_engine_is_looked_at_once_a_second_however_many_watch() -> None:
    engine = FakeEngine()
    feed = Feed(engine)

    async def watch() -> int:
        return len([event async for event in feed.frames(most=11)])

    began_s = asyncio.get_running_loop().time()
    assert await asyncio.gather(*(watch() for _ in range(20))) == [11] * 20
    assert len(engine.looks) == 11
    assert asyncio.get_running_loop().time() - began_s == pytest.approx(10 * IDLE_EVERY_S)


async def test_nobody_watches_nobody_looks() -> None:
    engine = FakeEngine()
    feed = Feed(engine)
    events = feed.frames(most=None)
    await anext(events)
    await events.aclose()
    await asyncio.sleep(60)
    assert len(engine.looks) == 1
    async for _ in feed.frames(most=1):
        pass
    assert engine.looks[1] == float("inf"), "what happened meanwhile is nobody's to see"


async def test_a_busy_engine_is_looked_at_four_times_a_second_from_the_last_look_on() -> None:
    span = Span(track="compute", start_s=0.0, end_s=0.1, doing="decode")
    engine = FakeEngine(seen=msgspec.structs.replace(NOTHING_TO_SEE, spans=(span,)))
    seen = [parsed(event) async for event in Feed(engine).frames(most=5)]
    times = [frame["view"]["now_s"] for _, frame in seen]
    assert [b - a for a, b in itertools.pairwise(times)] == pytest.approx([EVERY_S] * 4)
    assert engine.looks == [float("inf"), *times[:-1]]


async def test_an_engine_that_restarts_is_told_of_and_shown_again() -> None:
    engine = FakeEngine(is_running=False)
    events = Feed(engine).frames(most=None)
    assert parsed(await anext(events)) == ("stopped", {"message": "the engine is restarting"})
    engine.is_running = True
    assert parsed(await anext(events))[0] == "frame"
    await events.aclose()


async def test_the_feed_ends_with_the_server_and_not_a_second_later() -> None:
    feed = Feed(FakeEngine())

    async def watch() -> float:
        async for _ in feed.frames(most=None):
            pass
        return asyncio.get_running_loop().time()

    watchers = [asyncio.create_task(watch()) for _ in range(3)]
    await asyncio.sleep(0.1)
    feed.close()
    assert await asyncio.gather(*watchers) == pytest.approx([0.1] * 3)


def test_rates_are_those_since_the_last_look() -> None:
    def view(now_s: float, **stats: float):
        return msgspec.structs.replace(
            NOTHING_TO_SEE, now_s=now_s, stats=EngineStats(uptime_s=now_s, **stats)
        )

    copy = Span(track="h2d", start_s=0, end_s=1, doing="staging", num_bytes=10**9, busy_s=0.5)
    tiny = Span(track="h2d", start_s=0, end_s=1, doing="staging", num_bytes=10, busy_s=1e-12)
    rates = Rates(model="m", version="1")
    first = rates.frame(view(10.0, output_tokens=5, compute_s=3.0), is_accepting=True)
    assert first.output_tokens_per_s == first.stall_share == first.h2d.bytes_per_s == 0
    later = view(12.0, output_tokens=25, compute_s=4.5, stall_s=0.5, h2d_bytes=4 * 10**8)
    second = rates.frame(msgspec.structs.replace(later, spans=(copy, tiny)), is_accepting=True)
    assert second.output_tokens_per_s == 10
    assert second.stall_share == 0.25
    assert second.h2d.bytes_per_s == 2 * 10**8
    assert second.h2d.peak_bytes_per_s == 2 * 10**9
    restarted = rates.frame(view(1.0, output_tokens=3), is_accepting=True)
    assert restarted.output_tokens_per_s == 0


@pytest.mark.realtime
async def test_mounted_in_another_application_the_page_finds_its_feed_beside_it(start) -> None:
    outer = web.Application()
    outer.add_subapp("/llm", create_app(FakeEngine()))
    server = await start(app=outer)
    async with server.http.get("/llm/") as reply:
        assert reply.content_type == "text/html"
    async with server.http.get("/llm/view?frames=1") as reply:
        assert (await reply.read()).startswith(b"event: frame")


async def test_a_look_at_a_full_engine_costs_little_processor_time() -> None:
    config = EngineConfig(
        device="sim", model="tiny", device_kv_bytes=32 * 2**20, host_pool_bytes=32 * 2**20
    )
    async with Engine(config) as engine:
        jobs = [asyncio.create_task(finish(engine, [number] * 400)) for number in range(50)]
        await asyncio.sleep(2e-3)
        assert engine.stats().resident_blocks > 500
        feed, began_s = Feed(engine), time.process_time()
        for _ in range(40):
            await feed._look()
        took_s = time.process_time() - began_s
        await asyncio.gather(*jobs)
    # About 2 ms; ten times that where the machine is crowded. Four a second are looked at while it
    # is busy, one while it is idle, which then shows less.
    assert took_s / 40 < 0.020


async def finish(engine: Engine, prompt: list[int]) -> None:
    async for _ in engine.generate(prompt, SamplingParams(max_tokens=50, output_kind="final")):
        pass


# --- with real engines --------------------------------------------------------------------


@pytest.mark.realtime
async def test_names_of_requests_are_escaped_json_and_sequences_are_seen(start) -> None:
    config = EngineConfig(device="sim", model="tiny", sim_gpu="rtx4090")
    async with Engine(config) as engine:
        server = await start(engine)
        stream = await engine.submit(list(range(50)), request_id="<img src=x onerror=alert(1)>")
        try:
            async with server.http.get("/view?frames=1") as reply:
                raw = await reply.text()
            frame = parsed(raw.encode())[1]
            assert frame["view"]["sequences"][0]["name"] == "<img src=x onerror=alert(1)>"
            assert "\n" not in raw.split("data: ")[1].removesuffix("\n\n")
        finally:
            stream.cancel()


async def test_a_stopped_engine_is_no_error_of_the_feed() -> None:
    engine = Engine(EngineConfig(device="sim", model="tiny"))
    with pytest.raises(EngineStopped):
        await engine.look()
